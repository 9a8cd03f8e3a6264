"""The versions that a result depends on."""

import platform

import timm
import torch

from ema_timm import __version__


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "ema_timm": __version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
