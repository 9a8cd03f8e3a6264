"""Hooks for FLOP counters, so that they count EMA attention.

On a CPU a C kernel computes the layer. Counters that trace PyTorch's functions or known modules do
not see it and report the network without EMA layers. Here are hooks for thop, ptflops, calflops and
fvcore. PyTorch's ``FlopCounterMode`` needs none; torchinfo and PyTorch's profiler take none and
cannot count the layer. All count multiply-accumulates of the closed form, as `ema_timm.ops.macs`.
"""

from collections.abc import Callable
from math import prod

from torch import Tensor, nn

from ema_timm.attention import EmaAttn, layer_types


def thop_ops(model: nn.Module | None = None) -> dict[type, Callable]:
    """For ``thop.profile(model, inputs, custom_ops=thop_ops(model))``.

    Args:
        model: The network, whose subclasses of `EmaAttn` are counted too, such as the rows of YOLO.
            None stands for every subclass that is imported.
    """
    return dict.fromkeys(layer_types(model), _count_for_thop)


def ptflops_hooks(model: nn.Module | None = None) -> dict[type, Callable]:
    """For ``get_model_complexity_info(..., custom_modules_hooks=ptflops_hooks(model))`` of ptflops.

    Its backend ``aten`` counts the layer by itself and ignores them.

    Args:
        model: As in `thop_ops`.
    """
    return dict.fromkeys(layer_types(model), _count_for_ptflops)


def calflops_hooks(model: nn.Module | None = None) -> dict[type, Callable]:
    """For ``calflops.pytorch_ops.MODULE_HOOK_MAPPING.update(calflops_hooks(model))``, once.

    Args:
        model: As in `thop_ops`.
    """
    return dict.fromkeys(layer_types(model), _count_for_calflops)


def fvcore_handles() -> dict[str, Callable]:
    """For ``FlopCountAnalysis(model, inputs).set_op_handle(**fvcore_handles())``.

    fvcore counts the product of a matrix and a stack of matrices as if the stack had one matrix.
    These handles count all of them.
    """
    return {"aten::matmul": _count_product}


def _macs(layer: EmaAttn, output: Tensor) -> int:
    batch, _, height, width = output.shape
    return layer.macs(batch, height, width)


def _count_for_thop(layer: EmaAttn, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.total_ops += _macs(layer, output)


def _count_for_ptflops(layer: EmaAttn, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.__flops__ += _macs(layer, output)


def _count_for_calflops(layer: EmaAttn, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.__macs__ += _macs(layer, output)
    layer.__flops__ += 2 * _macs(layer, output)


def _count_product(inputs: list, outputs: list) -> int:
    """Multiply-accumulates of a traced product, from the values of its node in the graph."""
    inner = inputs[0].type().sizes()[-1]
    return inner * prod(outputs[0].type().sizes())
