"""EMA attention layers whose convolutions or norm are more than their weights.

`EmaAttn` reads the weights of its children and does not call them, because the closed form needs
no convolution over all channels. That would leave out what wraps or hooks a child: a LoRA adapter,
``torch.nn.utils.prune``, ``weight_norm``, fake quantisation, an observer. Such a layer calls its
children instead and computes the paper's definition.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ema_timm.ops.reference import definition
from ema_timm.ops.weights import EmaWeights, laid_out_like, require_map

if TYPE_CHECKING:
    from ema_timm.attention import EmaAttn

# torch.fx keeps it whole: it compares sizes, which a proxy does not have.
torch.fx.wrap("require_map")

_logger = logging.getLogger(__name__)

KINDS: dict[str, type[nn.Module]] = {
    "conv1x1": nn.Conv2d,
    "conv3x3": nn.Conv2d,
    "gn": nn.GroupNorm,
}
"""The children of a layer, and their types."""

# Tools that hook every convolution in order to count or trace it. If their hooks made the layer
# call its children, the tools would count another layer than the one that runs.
_COUNTERS = (
    "calflops.",
    "deepspeed.profiling.",
    "fvcore.",
    "mmengine.analysis.",
    "ptflops.",
    "thop.",
    "torch_pruning.",
    "torchinfo.",
    "torchsummary.",
)

REMEDY = (
    "First merge adapters (peft: merge_and_unload()), make pruning permanent (prune.remove), "
    "remove weight_norm, and remove hooks."
)


def plain_weights(layer: "EmaAttn") -> EmaWeights | None:
    """The parameters of ``layer``, or None if it must call its children.

    Every forward passes here, so nothing makes a call of Python as long as the children are plain.

    Args:
        layer: An `EmaAttn`.
    """
    children = layer._modules
    mix, conv, norm = children["conv1x1"], children["conv3x3"], children["gn"]
    for child, kind in ((mix, nn.Conv2d), (conv, nn.Conv2d), (norm, nn.GroupNorm)):
        if (
            type(child) is not kind
            or child._forward_pre_hooks
            or child._forward_hooks
            or child._backward_pre_hooks
            or child._backward_hooks
            or "forward" in child.__dict__
        ):
            return None if obstacle(layer) else layer.weights()
    a, b, c = mix._parameters, conv._parameters, norm._parameters
    if not (a and b and c):  # a replica of DataParallel has plain tensors
        return layer.weights()
    return EmaWeights(a["weight"], a["bias"], b["weight"], b["bias"], c["weight"], c["bias"])


def obstacle(layer: "EmaAttn") -> str:
    """Why the weights of ``layer`` are not all that it computes with; empty if they are.

    Args:
        layer: An `EmaAttn`.
    """
    for name, kind in KINDS.items():
        child = layer._modules[name]
        own = type(child)
        if parametrize.is_parametrized(child):  # its weight is a property with the right value
            own = own.__bases__[0]
        if own is not kind:
            return f"{name} is a {own.__module__}.{own.__qualname__}"
        if "forward" in child.__dict__:
            return f"another library has replaced the forward of {name}"
        for hooks in (
            child._forward_pre_hooks,
            child._forward_hooks,
            child._backward_pre_hooks,
            child._backward_hooks,
        ):
            for hook in hooks.values():
                module = _module_of(hook)
                if not f"{module}.".startswith(_COUNTERS):
                    return f"{name} has a hook of {module}"
    return ""


def _module_of(hook: Callable) -> str:
    """The name of the module that defines a hook."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(hook.__module__)


def call_children(layer: "EmaAttn", x: Tensor) -> Tensor:
    """The output of ``layer`` by calls of its children, differentiable as they are.

    Args:
        layer: An `EmaAttn`.
        x: Feature map, (B, C, H, W), floating point.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.

    Raises:
        ValueError: If ``x`` does not fit, or the layer has an implementation that reads weights.
    """
    if layer.impl not in ("auto", "reference"):
        raise ValueError(
            f"impl={layer.impl!r} reads the weights of plain children, but {obstacle(layer)}. "
            "Use impl='auto'."
        )
    if not torch.compiler.is_compiling():
        _log_once(obstacle(layer))
    if not torch.jit.is_tracing():
        require_map(x, layer.groups, layer.channels // layer.groups)
    gated = definition(x, layer.groups, layer.conv1x1, layer.gn, layer.conv3x3, layer.cross_spatial)
    return laid_out_like(x, gated)


@cache
def _log_once(reason: str) -> None:
    _logger.warning(
        "EMA attention calls its convolutions one by one, which is slower, because %s.", reason
    )
