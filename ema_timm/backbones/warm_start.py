"""Identity initialisation (``warm_`` tags): added EMA layers do not change a network's outputs.

With γ = 0, β = 0, b₃ = 0 and a 3×3 convolution centred over its output channels (Σ_o W₃[o] = 0),
the gate's logits are 0 and the gate is 0.5 everywhere. Doubling the layer before or after undoes
it: multiplying by 2 and by 0.5 is exact in binary floating point. σ' is largest at 0 and the
gradients of γ, β and W₃ are not zero, so training changes the gate from the first step on.
(All-zero W₃ would preserve the function too, but leaves its output channels identical.)

timm's own attention layers are initialised likewise if they can be
(`ema_timm.backbones.timm_layers`). One with two gates halves twice, and the adjacent layer is
multiplied by 4.

Without cross-spatial learning each channel has its own logits, which include the output of the 3×3
convolution. There W₃ is 0, and every output channel gets its own gradient.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.slots import Slot, find_slots, slot_layers
from ema_timm.backbones.timm_layers import constant_state
from ema_timm.hooks import attached

GRID = 2.0**16


def neutral_state(layer: EmaAttn, grid: float = GRID) -> dict[str, Tensor]:
    """A state dict for ``layer`` with which its gate is 0.5 for every input.

    The 1×1 and 3×3 convolutions keep their random weights, the latter centred (0 without
    cross-spatial learning).

    Args:
        layer: The layer; not changed.
        grid: As in `centred`.
    """
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    zeros = ["conv3x3.bias", "gn.weight", "gn.bias"]
    if layer.cross_spatial:
        state["conv3x3.weight"] = centred(state["conv3x3.weight"], grid)
    else:
        zeros.append("conv3x3.weight")
    for name in zeros:
        state[name] = torch.zeros_like(state[name])
    return state


def centred(weight: Tensor, grid: float = GRID) -> Tensor:
    """``weight`` with a sum over output channels of exactly 0.

    Subtracting the mean leaves a rounding error, which large activations make visible in the gate.
    With multiples of 2⁻¹⁶ every partial sum is exact in float32, in any order.

    Args:
        weight: Weight of a convolution, output channels first.
        grid: The weights are multiples of 1 / grid. Those of 2⁻¹⁰ are exact in float16.
    """
    steps = (weight.float() * grid).round()
    steps = steps - steps.mean(0).round()
    rest = steps.sum(0)  # at most half a step an output channel
    channel = torch.arange(len(steps), device=steps.device).view(-1, *[1] * rest.dim())
    steps -= rest.sign() * (channel < rest.abs())
    return (steps / grid).to(weight.dtype)


def low_precision_grid(n: int) -> float:
    """A grid for `centred` whose weights float16 and bfloat16 hold exactly, too.

    bfloat16 has 8 bits, so the weights of a fresh 3×3 convolution of ``n`` channels, at most
    1 / (3 √n), get up to 128 steps.

    Args:
        n: Channels of a group.
    """
    return 2.0 ** math.floor(math.log2(128 * 3 * math.sqrt(n)))


@torch.no_grad()
def start_neutral(slots: Iterable[Slot]) -> None:
    """Initialise the layers so that the network's outputs stay the same, in place."""
    for slot in slots:
        for name in slot.doubled:
            module, _, attribute = name.partition(".")
            getattr(getattr(slot.block, module), attribute).mul_(2)
        slot.block.se.load_state_dict(neutral_state(slot.block.se))


def require_doubling(slots: Iterable[Slot]) -> None:
    """Raise ValueError if the layer next to a place cannot be doubled."""
    for slot in slots:
        for name in slot.doubled:
            module_name, _, attribute = name.partition(".")
            module = getattr(slot.block, module_name)
            act = getattr(module, "act", None)
            scales = act is None or isinstance(act, nn.Identity | nn.ReLU | nn.LeakyReLU)
            if not isinstance(getattr(module, attribute, None), Tensor) or not scales:
                raise ValueError(
                    f"preserve=True doubles {slot.path}.{name}, and "
                    f"{type(module).__name__} has no such linear part. Use preserve=False, which "
                    "keeps the layers' random weights."
                )


def warm_start_filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add attention layers to weights without them; timm's ``pretrained_filter_fn``.

    Weights that hold any tensor of an attention layer are those of ``model`` and pass unchanged, so
    that timm's strict loading reports what they lack. A timm layer without an identity
    initialisation keeps its own weights.

    Args:
        state_dict: Weights of the network with or without attention layers.
        model: The network with attention layers.
    """
    slots = [slot for slot in find_slots(model) if slot.filled]
    names = {slot.path: f"{slot.path}.se" for slot in slots}
    if any(key.startswith(tuple(f"{name}." for name in names.values())) for key in state_dict):
        return state_dict
    starts = {slot.path: _first_state(slot.block.se) for slot in slots}
    require_doubling(slot for slot in slots if starts[slot.path][1] != 1)
    mapped = dict(state_dict)
    for slot in slots:
        state, factor = starts[slot.path]
        for name in slot.doubled_names:
            if name in mapped:  # strict loading reports the missing ones
                mapped[name] = mapped[name] * factor
        for name, tensor in state.items():
            mapped[f"{names[slot.path]}.{name}"] = tensor
    return mapped


def starts_neutral(model: nn.Module) -> bool | None:
    """Whether all layers have an identity initialisation; None without attention layers."""
    gains = [found[1] for module in model.modules() if (found := attached(module))]
    if gains:
        return all(gain != 1 for gain in gains)
    layers = slot_layers(model)
    if not layers:
        return None
    return all(isinstance(layer, EmaAttn) or constant_state(layer) for layer in layers)


def _first_state(layer: nn.Module) -> tuple[dict[str, Tensor], int]:
    """The initial state of a layer, and the factor for the adjacent layer."""
    if isinstance(layer, EmaAttn):
        return neutral_state(layer), 2
    return constant_state(layer) or (layer.state_dict(), 1)
