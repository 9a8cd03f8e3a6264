"""Keeps EMA layers in floating point when NNCF quantises a network for OpenVINO."""

import re

from torch import nn

from ema_timm.attention import EmaAttn


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
