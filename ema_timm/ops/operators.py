"""EMA attention as custom operators, which `torch.compile` calls without looking inside.

``ema_timm::closed_form`` calls the kernels that eager mode runs on the CPU. If Inductor fuses the
formula instead, it takes minutes to compile the backward of a ResNet, and the result is slower than
eager mode. ``ema_timm::fused`` launches the Triton kernels of `ema_timm.ops.gpu.fused.launch`.

Import this module late: registering takes longer than the rest of this package's import.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ema_timm.ops import autograd
from ema_timm.ops.formula import fold, statistics_type
from ema_timm.ops.gpu.steps import fold_in_few_operators
from ema_timm.ops.macs import closed_form_macs
from ema_timm.ops.saved import Saved, is_recorded, new_saved
from ema_timm.ops.weights import EmaWeights, fits, misfit

# Schemas are spelled out: PyTorch 2.5 does not infer them from tuple[...] and list[...].
_PARAMETERS = (
    "Tensor conv1x1_weight, Tensor conv1x1_bias, Tensor conv3x3_weight, Tensor conv3x3_bias, "
    "Tensor gn_weight, Tensor gn_bias"
)


def closed_form_operator(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`ema_timm.ops.formula.closed_form` as the operator ``ema_timm::closed_form``.

    Args:
        x: Feature map, (B, C, H, W), floating point, on the CPU.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    return _closed_form(x, *weights, groups, is_recorded(x, weights))[0]


def fused_operator(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`closed_form_operator` by Triton kernels, as the operator ``ema_timm::fused``.

    The caller has checked `ema_timm.ops.gpu.fused.available.require_fused` first.
    """
    return _fused(x, *weights, groups, is_recorded(x, weights))[0]


def _register(
    name: str, forward: Callable, backward: Callable, folding: Callable = fold
) -> Callable:
    """Register ``ema_timm::name`` and ``ema_timm::name_backward``; returns the first.

    Args:
        name: Name of the operator.
        forward: (x, folded weights, groups, save) -> (output, `Saved` or None).
        backward: (grad, x, saved, weights, groups, need_x, need_weights) -> (dx, gradients).
        folding: Weights -> folded weights.
    """
    operator = _register_forward(name, forward, folding)
    gradient = _register_backward(f"{name}_backward", backward)
    operator.register_autograd(partial(_differentiate, gradient), setup_context=_keep)
    return operator


def _register_forward(name: str, forward: Callable, folding: Callable) -> Callable:
    @torch.library.custom_op(
        f"ema_timm::{name}",
        mutates_args=(),
        schema=f"(Tensor x, {_PARAMETERS}, SymInt groups, bool save) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    )
    def operator(x, *rest):
        """The output and, if ``save``, the saved tensors; else empty tensors."""
        weights, (groups, save) = EmaWeights(*rest[:6]), rest[6:]
        n = x.shape[1] // groups
        if not fits(weights, n):  # a call of the operator by name has passed no other check
            raise ValueError(misfit(weights, n))
        folded = folding(statistics_type(x, weights))
        out, saved = forward(x, folded, groups, save)
        return out, *(saved or (x.new_empty(0), x.new_empty(0), x.new_empty(0)))

    @operator.register_fake
    def _(x, *rest):
        weights, (groups, save) = rest[:6], rest[6:]
        if any(w.device != x.device for w in weights):  # a meta tensor ends up here, in any call
            raise RuntimeError(
                f"EMA attention needs its input and weights on one device, got {x.device} and "
                f"{[str(w.device) for w in weights]}. Move the layer with layer.to(x.device)."
            )
        saved = (x.new_empty(0), x.new_empty(0), x.new_empty(0))
        if save:
            saved = new_saved(x, groups, torch.promote_types(x.dtype, torch.float32))
        return torch.empty_like(x), *saved

    return operator


def _register_backward(name: str, backward: Callable) -> Callable:
    @torch.library.custom_op(
        f"ema_timm::{name}",
        mutates_args=(),
        schema="(Tensor grad, Tensor x, Tensor gates, Tensor gate_map, Tensor vectors, "
        f"{_PARAMETERS}, SymInt groups, bool need_x, bool need_weights) -> Tensor[]",
    )
    def gradient(grad, x, gates, gate_map, vectors, *rest):
        """The gradient of ``x``, empty where not needed, then those of the parameters."""
        weights, (groups, need_x, need_weights) = rest[:6], rest[6:]
        saved = Saved(gates, gate_map, vectors)
        found = x, saved, EmaWeights(*weights), groups, need_x, need_weights
        dx, dw = autograd.outside_autocast(backward, grad, *found)
        found = [x.new_empty(0) if dx is None else dx]
        if dw is not None:
            found += [d.to(w.dtype) for d, w in zip(dw, weights, strict=True)]
        return found

    @gradient.register_fake
    def _(grad, x, gates, gate_map, vectors, *rest):
        weights, (_, need_x, need_weights) = rest[:6], rest[6:]
        found = [torch.empty_like(x) if need_x else x.new_empty(0)]
        if need_weights:
            found += [w.new_empty(w.shape) for w in weights]
        return found

    return gradient


def _keep(ctx, inputs, output) -> None:
    x, *weights = inputs[:7]
    ctx.groups = inputs[7]
    ctx.save_for_backward(x, *output[1:], *weights)


def _differentiate(gradient: Callable, ctx, grad: Tensor, *_) -> tuple:
    """Gradients of an operator's inputs, by the operator ``gradient``."""
    need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[1:7]
    if torch.is_grad_enabled():  # create_graph: the result must be differentiable again
        x, *rest = ctx.saved_tensors
        arguments = grad, x, EmaWeights(*rest[3:]), ctx.groups, need_x, need
        dx, dw = autograd.outside_autocast(autograd.differentiable_backward, *arguments)
        return dx, *dw, None, None
    dx, *dw = gradient(grad, *ctx.saved_tensors, ctx.groups, need_x, any(need))
    dw = [d if n else None for d, n in zip(dw or [None] * 6, need, strict=True)]
    return dx if need_x else None, *dw, None, None


def _closed_form_forward(x, folded, *rest):
    return autograd.kernel(x, folded).forward(x, folded, *rest)


def _fused_forward(*arguments):
    from ema_timm.ops.gpu.fused import launch

    return launch.forward(*arguments)


def _fused_backward(grad, x, saved, weights, *rest):
    from ema_timm.ops.gpu.fused import launch

    return launch.backward(grad, x, saved, statistics_type(x, weights), *rest)


_closed_form = _register("closed_form", _closed_form_forward, autograd.hand_written_backward)
_fused = _register("fused", _fused_forward, _fused_backward, fold_in_few_operators)


def _flops(x_shape: torch.Size, n: int) -> int:
    batch, channels, height, width = x_shape
    # A multiplication and its addition are two operations to PyTorch's counter.
    return 2 * closed_form_macs(batch * (channels // n), n, height, width)


@register_flop_formula([torch.ops.ema_timm.closed_form, torch.ops.ema_timm.fused])
def _count_forward(x_shape, weight_shape, *rest, **_) -> int:
    """For `torch.utils.flop_counter.FlopCounterMode`, which sees operators and not kernels."""
    return _flops(x_shape, weight_shape[0])


@register_flop_formula([torch.ops.ema_timm.closed_form_backward, torch.ops.ema_timm.fused_backward])
def _count_backward(grad_shape, x_shape, *rest, **_) -> int:
    """As often as the forward for the input's gradient, and once more for the parameters'."""
    *_, weight_shape, _, need_x, need_weights = rest
    return _flops(x_shape, weight_shape[0]) * (need_x + need_weights)
