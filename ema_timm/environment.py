"""The versions that a result depends on, and what can run here."""

import platform

import timm
import torch

from ema_timm import __version__
from ema_timm.errors import UserError, first_line
from ema_timm.ops.cpu import library
from ema_timm.ops.gpu import choices
from ema_timm.ops.gpu.fused.available import fused_unavailable


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "ema_timm": __version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def environment() -> dict[str, str]:
    """`versions`, and for each implementation what it runs on here."""
    cuda = torch.cuda.is_available()
    probe = torch.empty(1, 1, 1, 1, device="cuda" if cuda else "cpu")
    reason = fused_unavailable(probe, probe[0, 0, 0])
    return {
        **versions(),
        "CUDA": torch.cuda.get_device_name() if cuda else "not available",
        "reference": "runs anywhere",
        "closed_form": f"runs anywhere; on the CPU {library.status()}, "
        f"{torch.get_num_threads()} threads",
        "fused": f"cannot run here: {reason}" if reason else "runs",
        **_choices(probe.device),
    }


def _choices(device: torch.device) -> dict[str, str]:
    """What `ema_timm.tune` chose on ``device``, one entry a layer."""
    try:
        asked = choices.wish()
    except UserError as error:
        asked = str(error)
    notes = choices.read(device)
    made = f"{len(notes.chosen)} layers" if notes.chosen else "none; `ema-timm tune` makes them"
    if device.type != "cuda":
        made += ", and without CUDA none is looked up"
    return {
        "EMA_TIMM_GPU": asked,
        "choices": made,
        **{f"{name} is not tried": reason for name, reason in notes.barred.items()},
        **{str(layer): name for layer, name in notes.chosen.items()},
    }


# MERGED: Where a command runs.
def pick_device(name: str) -> str:
    """The device that ``auto`` stands for: CUDA, then MPS, then the CPU.

    Raises:
        UserError: If the named device is not at hand.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not usable here: {first_line(error)} Use --device auto or cpu."
        ) from error
    return name
