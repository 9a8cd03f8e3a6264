"""Keeps EMA layers in floating point when NNCF quantises a network, and turns telemetry off."""

import re
import sys

from torch import nn

from ema_timm.attention import EmaAttn


def disable_telemetry() -> None:
    """Keep OpenVINO and NNCF from sending telemetry in this process.

    Both send it to Google Analytics through the package ``openvino_telemetry``, which forks the
    process from a thread for each message. Both send none if that package cannot be imported.
    Call this before the first import of either: it has no effect afterwards.
    """
    sys.modules.setdefault("openvino_telemetry", None)


def layer_patterns(model: nn.Module) -> list[str]:
    """Patterns of the operators of every EMA layer, as NNCF finds them in an OpenVINO model.

    For ``nncf.quantize(..., ignored_scope=nncf.IgnoredScope(patterns=layer_patterns(model)))``.
    Only OpenVINO's own converter keeps the names of layers in the names of operators.

    Args:
        model: The network that ``openvino.convert_model`` was given.

    Raises:
        ValueError: If ``model`` holds no EMA layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, EmaAttn)]
    if not names:
        raise ValueError(f"{type(model).__name__} holds no EMA attention layer.")
    return [rf".*__module\.{re.escape(name)}[./].*" for name in names]
