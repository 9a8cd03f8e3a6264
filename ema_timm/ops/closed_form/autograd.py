"""What autograd sees of the closed form: one node, whose backward is written out by hand."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ema_timm.ops.closed_form import eager, native, whole_map
from ema_timm.ops.closed_form.formula import closed_form, fold, statistics_type
from ema_timm.ops.weights import EmaWeights, FoldedWeights


def closed_form_eager(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`ema_timm.ops.closed_form.formula.closed_form`, computed and differentiated without a graph.

    Keeps for the backward, beyond ``x`` and the parameters, the gates along H and W, the gate map
    and three numbers a channel. Differentiable any number of times: a backward that is itself
    recorded goes through the traceable form.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``, owning its memory.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        return _ClosedForm.apply(x, groups, *weights)
    folded = fold(statistics_type(x, weights))
    return kernel(x).forward(x, folded, groups, save=False)[0]


def closed_form_folded_eager(x: Tensor, weights: FoldedWeights, groups: int) -> Tensor:
    """`closed_form_eager` from folded weights, for inference only.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Folded parameters of one layer in the type of the statistics.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``, owning its memory.
    """
    return kernel(x).forward(x, weights, groups, save=False)[0]


def kernel(x: Tensor) -> ModuleType:
    """Who computes on ``x``, (B, C, H, W): the native kernel where it can, else PyTorch operators.

    `whole_map` on CUDA, `eager` elsewhere.

    All have a ``forward`` and a ``backward`` of one signature, and in ``Saved`` what goes from one
    to the other.
    """
    if whole_map.takes(x):
        return whole_map
    return native if native.takes(x) else eager


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, *weights):
        """Gate ``x``, (B, C, H, W), by the six `EmaWeights` of a layer, and keep `Saved`."""
        folded = fold(statistics_type(x, EmaWeights(*weights)))
        out, saved = kernel(x).forward(x, folded, groups, save=True)
        ctx.save_for_backward(x, *weights, *saved)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of the arguments of `forward` from that of its output, (B, C, H, W)."""
        x, *rest = ctx.saved_tensors
        weights, saved = EmaWeights(*rest[:6]), kernel(x).Saved(*rest[6:])
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph: the result must be differentiable again
            dx, dw = differentiable_backward(grad, x, weights, ctx.groups, need_x, need)
            return dx, None, *dw
        dx, dw = kernel(x).backward(
            grad, x, saved, statistics_type(x, weights), ctx.groups, need_x, any(need)
        )
        if dw is None:
            return dx, None, *[None] * 6
        dw = [d.to(w.dtype) if n else None for d, w, n in zip(dw, weights, need, strict=True)]
        return dx, None, *dw

    @staticmethod
    def jvp(ctx, *tangents):
        """Refused: a call with dual tensors takes the traceable form."""
        raise RuntimeError(
            "This call of EMA attention was not set up for forward-mode differentiation. Make the "
            "dual tensors before the call, or use impl='reference'."
        )


def differentiable_backward(
    grad: Tensor,
    x: Tensor,
    weights: EmaWeights,
    groups: int,
    need_x: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of ``x`` and of the weights as recorded operations, for derivatives of them.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        x: The input, (B, C, H, W).
        weights: Parameters of one layer.
        groups: G.
        need_x: Whether the gradient of ``x`` is wanted.
        need: Whether that of each parameter is wanted.

    Returns:
        The gradient of ``x``, (B, C, H, W), and those of the parameters; None where not wanted.
    """
    # Aliases, so that a path from x back to the same weights (a layer used twice) stays outside.
    inputs = [x.view_as(x), *[w.view_as(w) for w in weights]]
    wanted = [t for t, n in zip(inputs, [need_x, *need], strict=True) if n]
    out = closed_form(inputs[0], EmaWeights(*inputs[1:]), groups)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    dx, *dw = [next(found) if n else None for n in [need_x, *need]]
    return dx, dw
