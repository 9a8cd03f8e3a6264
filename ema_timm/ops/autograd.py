"""The closed form as one node of autograd, with a hand-written backward."""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ema_timm.ops.cpu import chunks, native
from ema_timm.ops.formula import closed_form, statistics_type
from ema_timm.ops.gpu import passes
from ema_timm.ops.saved import Saved, is_recorded, restored
from ema_timm.ops.weights import EmaWeights


def closed_form_eager(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`ema_timm.ops.formula.closed_form`, computed and differentiated without a graph.

    Saves for the backward, beyond ``x`` and the parameters, the gates along H and W, the gate map
    and a few vectors a tile. Differentiable any number of times: a backward that is itself recorded
    uses the formula.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``, owning its memory.
    """
    if x._is_zerotensor():  # autograd's tensor of zeros has no memory
        x = x.clone()
    if is_recorded(x, weights):
        return _ClosedForm.apply(x, groups, *weights)
    chosen = kernel(x, weights)
    return chosen.forward(x, chosen.fold(statistics_type(x, weights)), groups, save=False)[0]


def kernel(x: Tensor, others: Iterable[Tensor]) -> ModuleType:
    """The module whose passes run on ``x``, (B, C, H, W).

    `passes` on CUDA, else `native` if it can run, else `chunks`. All have functions ``fold``,
    ``forward`` and ``backward`` of the same signatures; `native.takes` explains ``others``.
    """
    if passes.takes(x):
        return passes
    return native if native.takes(x, others) else chunks


def saved_type(x: Tensor) -> type[Saved] | type[passes.PassesSaved]:
    """The class of the tensors that the forward of ``x`` saved, which differ on CUDA."""
    return passes.PassesSaved if passes.takes(x) else Saved


def outside_autocast(function: Callable, x: Tensor, *rest):
    """Call ``function(x, *rest)`` with autocast switched off on the device of ``x``.

    Inside autocast, products of weights in half precision would reach the kernels as if they were
    float32.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(x, *rest)
    with torch.autocast(device, enabled=False):
        return function(x, *rest)


def hand_written_backward(
    grad: Tensor,
    x: Tensor,
    saved: Saved | passes.PassesSaved,
    weights: EmaWeights,
    groups: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, EmaWeights | None]:
    """Gradients by `kernel`, from what the forward saved and autograd handed back.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        x: The input, (B, C, H, W).
        saved: From the forward.
        weights: Parameters of the layer.
        groups: G.
        need_x: Whether the gradient of ``x`` is needed.
        need_weights: Whether the gradients of the parameters are needed.

    Returns:
        The gradient of ``x`` in its type and layout, and those of the parameters; None where not
        needed.
    """
    if grad._is_zerotensor():  # as in the forward
        grad = grad.clone()
    if passes.takes(x):
        weights = statistics_type(x, weights)
        return passes.backward(grad, x, saved, weights, groups, need_x, need_weights)
    x, saved, weights = restored(grad, x, saved, weights, groups)
    chosen = kernel(x, (*weights, *saved, grad))
    return chosen.backward(grad, x, saved, weights, groups, need_x, need_weights)


def _is_hidden(x: Tensor) -> bool:
    """Whether a dispatch mode is on that would not see the passes on ``x``: the C kernel."""
    return native.is_watched() and not passes.takes(x)


def _is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for many, as in ``torch.autograd.grad(is_grads_batched=True)``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, *weights):
        """Gate ``x``, (B, C, H, W), by the six `EmaWeights` of a layer, and keep `Saved`."""
        chosen = kernel(x, weights)
        folded = chosen.fold(statistics_type(x, EmaWeights(*weights)))
        out, saved = chosen.forward(x, folded, groups, save=True)
        ctx.save_for_backward(x, *weights, *saved)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of the arguments of `forward` from that of its output, (B, C, H, W)."""
        x, *rest = ctx.saved_tensors
        weights, saved = EmaWeights(*rest[:6]), saved_type(x)(*rest[6:])
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or _is_batched(grad) or _is_hidden(x):
            # create_graph, whose result must be differentiable again; or vmap, or a tracer.
            arguments = grad, x, weights, ctx.groups, need_x, need
            dx, dw = outside_autocast(differentiable_backward, *arguments)
            return dx, None, *dw
        arguments = grad, x, saved, weights, ctx.groups, need_x, any(need)
        dx, dw = outside_autocast(hand_written_backward, *arguments)
        if dw is None:
            return dx, None, *[None] * 6
        dw = [d.to(w.dtype) if n else None for d, w, n in zip(dw, weights, need, strict=True)]
        return dx, None, *dw

    @staticmethod
    def jvp(ctx, *tangents):
        """An error: dispatch gives calls with dual tensors to the formula."""
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
    """Gradients of ``x`` and the weights by autograd of the formula, recorded in grad mode.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        x: The input, (B, C, H, W).
        weights: Parameters of one layer.
        groups: G.
        need_x: Whether the gradient of ``x`` is needed.
        need: Whether that of each parameter is needed.

    Returns:
        The gradient of ``x``, (B, C, H, W), and those of the parameters; None where not needed.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that a path from x back to the same weights (a layer used twice) stays
        # outside.
        inputs = [x.view_as(x), *[w.view_as(w) for w in weights]]
        wanted = [t for t, n in zip(inputs, [need_x, *need], strict=True) if n]
        out = closed_form(inputs[0], EmaWeights(*inputs[1:]), groups)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=recorded))
    dx, *dw = [next(found) if n else None for n in [need_x, *need]]
    return dx, dw
