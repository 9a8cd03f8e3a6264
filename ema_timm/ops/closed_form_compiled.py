"""The closed form as one opaque operator, for `torch.compile` on the CPU.

Inductor cannot look inside: it calls the kernels that eager runs. Left to fuse the traceable form,
it spent minutes on the backward of a ResNet and then ran it slower than eager.
"""

import torch
from torch import Tensor

from ema_timm.ops.closed_form import fold, statistics_type
from ema_timm.ops.closed_form_autograd import kernel
from ema_timm.ops.closed_form_eager import Saved, new_saved
from ema_timm.ops.weights import EmaWeights


def closed_form_opaque(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`ema_timm.ops.closed_form.closed_form` as the operator ``ema_timm::closed_form``.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    save = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))
    return _forward(x, *weights, groups, save)[0]


# Schemas are spelled out: PyTorch 2.5 does not infer them from tuple[...] and list[...].
_PARAMETERS = (
    "Tensor conv1x1_weight, Tensor conv1x1_bias, Tensor conv3x3_weight, Tensor conv3x3_bias, "
    "Tensor gn_weight, Tensor gn_bias"
)


@torch.library.custom_op(
    "ema_timm::closed_form",
    mutates_args=(),
    schema=f"(Tensor x, {_PARAMETERS}, SymInt groups, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    conv1x1_weight: Tensor,
    conv1x1_bias: Tensor,
    conv3x3_weight: Tensor,
    conv3x3_bias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    groups: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = EmaWeights(
        conv1x1_weight, conv1x1_bias, conv3x3_weight, conv3x3_bias, gn_weight, gn_bias
    )
    out, saved = kernel(x).forward(x, fold(statistics_type(x, weights)), groups, save)
    return out, *(saved or (x.new_empty(0), x.new_empty(0), x.new_empty(0)))


@_forward.register_fake
def _(x, *rest):
    groups, save = rest[6:]
    saved = (x.new_empty(0), x.new_empty(0), x.new_empty(0))
    if save:
        saved = new_saved(x, groups, torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), *saved


@torch.library.custom_op(
    "ema_timm::closed_form_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor gates, Tensor gate_map, Tensor vectors, "
    f"{_PARAMETERS}, SymInt groups, bool need_x, bool need_weights) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    gate_map: Tensor,
    vectors: Tensor,
    conv1x1_weight: Tensor,
    conv1x1_bias: Tensor,
    conv3x3_weight: Tensor,
    conv3x3_bias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    groups: int,
    need_x: bool,
    need_weights: bool,
) -> list[Tensor]:
    weights = EmaWeights(
        conv1x1_weight, conv1x1_bias, conv3x3_weight, conv3x3_bias, gn_weight, gn_bias
    )
    dx, dw = kernel(x).backward(
        grad,
        x,
        Saved(gates, gate_map, vectors),
        statistics_type(x, weights),
        groups,
        need_x,
        need_weights,
    )
    found = [x.new_empty(0) if dx is None else dx]
    if dw is not None:
        found += [d.to(w.dtype) for d, w in zip(dw, weights, strict=True)]
    return found


@_backward.register_fake
def _(grad, x, gates, gate_map, vectors, *rest):
    weights, (_, need_x, need_weights) = rest[:6], rest[6:]
    found = [torch.empty_like(x) if need_x else x.new_empty(0)]
    if need_weights:
        found += [w.new_empty(w.shape) for w in weights]
    return found


def _keep(ctx, inputs, output):
    x, *weights = inputs[:7]
    ctx.groups = inputs[7]
    ctx.save_for_backward(x, *output[1:], *weights)


def _differentiate(ctx, grad, *_):
    need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[1:7]
    dx, *dw = _backward(grad, *ctx.saved_tensors, ctx.groups, need_x, any(need))
    dw = [d if n else None for d, n in zip(dw or [None] * 6, need, strict=True)]
    return dx if need_x else None, *dw, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
