"""The gates that a network's EMA attention layers compute for given images.

Every layer multiplies its input by its gate map, whoever computes the product: the definition, the
closed form in C or in PyTorch operators, Triton kernels. So the maps come from what all of them
have in common, the layer's input and its weights, by the formula of
`ema_timm.ops.formula`; never from output / input, which is 0 / 0 where a ReLU was.

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
    """What one layer computed for one batch, in float32 (float64 for float64 input).

    Attributes:
        gate_map: A; the layer's output is its input times this. (B, G, H, W), one map a group; of
            a layer without cross-spatial learning (B, C, H, W), where each channel has its own.
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
            detector. It runs once, in eval mode and without gradients, and is left as it was.
        images: What the network takes, prepared as it takes them: (B, C, H, W), or a list of
            (C, H, W) for torchvision's detectors. Moved to the network's device and type.

    Returns:
        By the layer's name in ``model``, in the order in which they ran: (B, G, H, W), on the
        layer's device; (B, C, H, W) of a layer without cross-spatial learning.

    Raises:
        UserError: If the network does not show its layers, as a compiled one, or none of them ran.
    """
    return {name: gates.gate_map for name, gates in layer_gates(model, images).items()}


def layer_gates(model: nn.Module, images: Tensor | Sequence[Tensor]) -> dict[str, LayerGates]:
    """`attention_maps` with the gates along height and width that each map was made with."""
    layers = _layers(model)
    found: dict[str, LayerGates] = {}

    def keep(name: str, layer: EmaAttn, inputs: tuple[Tensor, ...]) -> None:
        if name in found:
            raise UserError(
                f"attention maps are of layers that run once an image, and {name} ran twice. Give "
                "the part of the network that runs it once."
            )
        # Now, while nobody has changed the input in place. The layer, too, leaves autocast.
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
            "the network that computes with them."
        )
    return found


def last_of_stages(model: nn.Module, gates: dict[str, LayerGates]) -> list[str]:
    """The last layer of each stage of ``model``, in the order in which they ran.

    A stage is what the names count (``layer1``, ``blocks.3``); elsewhere, as in a detector's neck,
    it is all layers on maps of one size.
    """
    stages = {f"{slot.path}.se": slot.stage for slot in find_slots(model)}
    last = {stages.get(name, each.gate_map.shape[2:]): name for name, each in gates.items()}
    return [name for name in gates if name in last.values()]


def _layers(model: nn.Module) -> dict[str, EmaAttn]:
    """The layers by name; refuses networks whose layers cannot be watched."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        # PyTorch keeps a compiled forward apart from the module's own, and does not look at hooks
        # that come later.
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                f"attention maps need the layers to run one by one, and {name or 'the network'} "
                f"({kind}) is compiled. {_SHOW_LAYERS}"
            )
        if isinstance(module, nn.DataParallel):
            raise UserError(
                f"attention maps are of one device, and {name or 'the network'} ({kind}) spreads "
                "a batch over several. Give its .module."
            )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, EmaAttn)}
    if not layers:
        raise UserError(
            f"attention maps are of EMA attention layers, and {type(model).__name__} shows none. "
            f"A scripted, traced or exported network hides them. {_SHOW_LAYERS}"
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
