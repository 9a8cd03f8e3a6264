"""The attention maps that a network's EMA attention layers compute for given images.

Every layer multiplies its input by its map, whichever implementation runs. The maps are computed
from the layer's input and its weights by the formula of `ema_timm.ops.formula`, not as output /
input, which is 0 / 0 after a ReLU.

B batch, C channels, G groups, n = C / G, H height, W width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.modes import evaluating
from ema_timm.backbones.slots import find_slots
from ema_timm.errors import UserError
from ema_timm.ops.formula import fold, gate_logits, pools_and_gates, statistics_type
from ema_timm.ops.parallel import channel_logits

_SHOW_LAYERS = "Give the network that it was made from."


class LayerGates(NamedTuple):
    """The gates of one layer for one batch, in float32 (float64 for float64 input).

    Attributes:
        gate_map: A; the layer's output is its input times this. (B, G, H, W), one map per group;
            without cross-spatial learning (B, C, H, W), one map per channel.
        along_height: Gate of each row, (B, G, n, H).
        along_width: Gate of each column, (B, G, n, W).
    """

    gate_map: Tensor
    along_height: Tensor
    along_width: Tensor


def attention_maps(model: nn.Module, images: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """The gate maps of every EMA attention layer of ``model`` for ``images``.

    A layer's output is its input times its maps, each repeated over the channels of its group::

        layer(x) == x * maps.repeat_interleave(x.shape[1] // maps.shape[1], dim=1)

    Args:
        model: Any network that holds `EmaAttn` layers: a classifier, timm's ``features_only``, a
            detector. It runs once, in eval mode and without gradients; its modes are restored.
        images: Prepared images: (B, C, H, W), or a list of (C, H, W) for torchvision's detectors.
            They are moved to the network's device and type.

    Returns:
        The map of each layer by its name in ``model``, in the order in which the layers ran:
        (B, G, H, W), on the layer's device; (B, C, H, W) without cross-spatial learning.

    Raises:
        UserError: If the layers are hidden, as in a compiled network, or none of them ran.
    """
    return {name: gates.gate_map for name, gates in layer_gates(model, images).items()}


def layer_gates(model: nn.Module, images: Tensor | Sequence[Tensor]) -> dict[str, LayerGates]:
    """`attention_maps` with the gates along height and width of each map."""
    layers = _layers(model)
    found: dict[str, LayerGates] = {}

    def keep(name: str, layer: EmaAttn, inputs: tuple[Tensor, ...]) -> None:
        if name in found:
            raise UserError(
                f"attention maps need layers that run once per image, but {name} ran twice. Give "
                "the part of the network that runs it once."
            )
        # At once: later modules may change the input in place. The layer leaves autocast as well.
        (x,) = inputs
        with torch.autocast(x.device.type, enabled=False):
            found[name] = _gates(layer, x)

    with ExitStack() as left:
        left.enter_context(torch.no_grad())
        left.enter_context(evaluating(model))
        for name, layer in layers.items():
            left.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        model(_moved(images, next(model.parameters())))
    if not found:
        raise UserError(
            f"none of the {len(layers)} EMA attention layers of {type(model).__name__} ran. Give "
            "the network that runs them."
        )
    return found


def last_of_stages(model: nn.Module, gates: dict[str, LayerGates]) -> list[str]:
    """The last layer of each stage of ``model``, in the order in which they ran.

    Stages are those of the names (``layer1``, ``blocks.3``). Elsewhere, as in a detector's neck,
    layers on maps of one size are a stage.
    """
    stages = {f"{slot.path}.se": slot.stage for slot in find_slots(model)}
    last = {stages.get(name, each.gate_map.shape[2:]): name for name, each in gates.items()}
    return [name for name in gates if name in last.values()]


def _layers(model: nn.Module) -> dict[str, EmaAttn]:
    """The layers by name; UserError for networks whose layers cannot be hooked."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        # A compiled forward ignores hooks that are registered later.
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                f"attention maps need the layers to run one by one, but {name or 'the network'} "
                f"({kind}) is compiled. {_SHOW_LAYERS}"
            )
        if isinstance(module, nn.DataParallel):
            raise UserError(
                f"attention maps are computed on one device, but {name or 'the network'} ({kind}) "
                "spreads a batch over several. Give its .module."
            )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, EmaAttn)}
    if not layers:
        raise UserError(
            f"attention maps are of EMA attention layers, but {type(model).__name__} has none, or "
            f"hides them as scripted, traced and exported networks do. {_SHOW_LAYERS}"
        )
    return layers


def _moved(images: Tensor | Sequence[Tensor], like: Tensor) -> Tensor | list[Tensor]:
    if isinstance(images, Tensor):
        return images.to(like.device, like.dtype)
    return [image.to(like.device, like.dtype) for image in images]


def _gates(layer: EmaAttn, x: Tensor) -> LayerGates:
    weights = layer.weights()
    folded = fold(statistics_type(x, weights))
    g = x.reshape(x.shape[0], layer.groups, -1, *x.shape[2:])  # (B, G, n, H, W)
    g = g.to(folded.gn_weight.dtype)
    _, _, along_height, along_width = pools_and_gates(g, folded)
    if layer.cross_spatial:
        logits = gate_logits(g, folded)
    else:
        logits = channel_logits(g.flatten(0, 1), weights).view(x.shape)
    return LayerGates(logits.sigmoid(), along_height, along_width)
