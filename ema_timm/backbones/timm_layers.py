"""timm's own attention layers in the places of EMA attention, so that networks can be compared."""

from typing import NamedTuple

from timm.layers import create_attn, get_attn
from torch import Tensor, nn

_GATES = ("Sigmoid", "Hardsigmoid", "HardSigmoid", "HardSigmoidMe")
"""Class names of the gates that are one half at 0, in timm and PyTorch."""


class _Constant(NamedTuple):
    """With zero weights and biases in these modules a layer is the factor 1 / ``undone``."""

    zeros: tuple[str, ...]
    undone: int


_CONSTANT = {
    "SEModule": _Constant(("fc2",), 2),
    "EffectiveSEModule": _Constant(("fc",), 2),
    "EcaModule": _Constant(("conv",), 2),
    "CecaModule": _Constant(("conv",), 2),
    # Two gates, one after the other. The spatial one ends in a norm.
    "CbamModule": _Constant(("channel.fc2", "spatial.conv.bn"), 4),
    "LightCbamModule": _Constant(("channel.fc2", "spatial.conv.bn"), 4),
    "CoordAttn": _Constant(("conv_h", "conv_w"), 4),
    "SimpleCoordAttn": _Constant(("fc_h", "fc_w"), 2),
    "EfficientLocalAttn": _Constant(("norm_h", "norm_w"), 4),
    "StripAttn": _Constant(("conv_h", "conv_w"), 2),
}
"""By class name, because older timm lacks some. Training changes each from the first step on."""


def make_layer(name: str, channels: int, kwargs: dict, like: Tensor) -> nn.Module:
    """One of timm's attention layers.

    Args:
        name: Name for timm's ``create_attn``, such as "se", "eca", "cbam" or "coord".
        channels: Width of the feature map.
        kwargs: Other arguments of the layer.
        like: Tensor with the device and type of the layer.

    Raises:
        ValueError: If timm has no layer of that name, or cannot build it for such a map.
        TypeError: If it does not have these arguments.
    """
    require_layer(name)
    try:
        return create_attn(name, channels, device=like.device, dtype=like.dtype, **kwargs)
    except AssertionError as error:  # how timm refuses
        raise ValueError(
            f"timm's {name!r} needs more than a width of {channels}: {error or 'no reason given'}."
        ) from error


def require_layer(name: str) -> None:
    """Raise ValueError if timm's ``create_attn`` has no layer of that name."""
    try:
        known = isinstance(name, str) and get_attn(name) is not None
    except AssertionError:  # how timm refuses
        known = False
    if not known:
        raise ValueError(
            f"attn must be 'ema' or a name of timm's create_attn, such as 'se', 'eca', 'cbam' or "
            f"'coord', got {name!r}."
        )


def constant_state(layer: nn.Module) -> tuple[dict[str, Tensor], int] | None:
    """A state dict with which one of timm's layers multiplies every map by the same power of two.

    Args:
        layer: The layer; not changed.

    Returns:
        The state, and the factor that undoes the layer exactly; None if there is no such state.
    """
    known = _CONSTANT.get(type(layer).__name__)
    if known and getattr(layer, "conv2", None) is not None:  # "ecam", which ends in another one
        known = known._replace(zeros=("conv2",))
    if known is None or getattr(layer, "has_skip", False):
        return None
    gates = [m for name, m in layer.named_modules() if name.rpartition(".")[2] == "gate"]
    if not all(type(gate).__name__ in _GATES for gate in gates):
        return None
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    for name in known.zeros:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                state[f"{name}.{kind}"].zero_()
    return state, known.undone
