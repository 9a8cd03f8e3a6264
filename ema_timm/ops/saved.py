"""What the hand-written backwards share: saved tensors, and the gradients of the parameters.

Saved are only the tensors beyond the input and the weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.weights import EmaWeights, FoldedWeights, shapes


class Saved(NamedTuple):
    """What the backward needs; BG = B·G tiles, n = C / G channels of a group, H height, W width.

    Attributes:
        gates: Gates along H and W, (BG, n, H + W).
        gate_map: A = sigmoid(L), (BG, H, W).
        vectors: A centre of y close to its mean, what it lacks to the mean, 1/std of y, and u,
            (4, BG, n).
    """

    gates: Tensor
    gate_map: Tensor
    vectors: Tensor


def is_recorded(x: Tensor, weights: EmaWeights) -> bool:
    """Whether autograd records a call with these tensors, so that a backward may follow."""
    return torch.is_grad_enabled() and (x.requires_grad or any([w.requires_grad for w in weights]))


def new_saved(x: Tensor, groups: int, dtype: torch.dtype) -> Saved:
    """Memory for what the backward of ``x``, (B, C, H, W), will need.

    Args:
        x: The input of the forward.
        groups: G; divides C.
        dtype: The type of the statistics.
    """
    batch, channels, height, width = x.shape
    tiles, n = batch * groups, channels // groups
    return Saved(
        x.new_empty((tiles, n, height + width), dtype=dtype),
        x.new_empty((tiles, height, width), dtype=dtype),
        x.new_empty((4, tiles, n), dtype=dtype),
    )


def restored(
    grad: Tensor, x: Tensor, saved: Saved, weights: EmaWeights, groups: int
) -> tuple[Tensor, Saved, EmaWeights]:
    """``x``, ``saved`` and ``weights`` as the forward had them, the weights in its wide type.

    Hooks on saved tensors may hand back equal numbers in another type or at other strides.

    Args:
        grad: The gradient of the output, (B, C, H, W), in the type that ``x`` had.
        x: What came back for the input.
        saved: What came back for the rest.
        weights: What came back for the parameters.
        groups: G.

    Raises:
        RuntimeError: If something came back in another shape.
    """
    batch, channels, height, width = grad.shape
    tiles, n = batch * groups, channels // groups
    back = (x, *saved, *weights)
    if tuple([t.shape for t in back]) != (
        grad.shape,
        (tiles, n, height + width),
        (tiles, height, width),
        (4, tiles, n),
        *shapes(n),
    ):
        raise RuntimeError(
            "A hook on saved tensors must give back the shape that it was given; EMA attention "
            f"got {[tuple(t.shape) for t in back]} for an input of shape {tuple(grad.shape)}."
        )
    dtype = torch.promote_types(grad.dtype, torch.float32)
    # A `to` that changes nothing takes longer than all the checks here.
    wide = [t if t.dtype is dtype else t.to(dtype) for t in (*saved, *weights)]
    x = x if x.dtype is grad.dtype else x.to(grad.dtype)
    return x, Saved(*[t.contiguous() for t in wide[:3]]), EmaWeights(*wide[3:])


def finish_weights(found: FoldedWeights, logits: Tensor, w: EmaWeights) -> EmaWeights:
    """Gradients of the layer's parameters from those of the folded parameters.

    Args:
        found: Gradients of the folded parameters. That of β is still without its part in v.
        logits: The sum of dL over all tiles and pixels, (1,).
        w: The layer's parameters in the type of the statistics.
    """
    n = w.gn_bias.shape[0]
    v = w.gn_bias.softmax(0)
    kernel = found.kernel.t().reshape(9 * n)
    dv = torch.mv(w.conv3x3_weight.reshape(n, 9 * n), kernel).addcmul_(w.conv3x3_bias, logits)
    return EmaWeights(
        found.mix_weight.view_as(w.conv1x1_weight),
        found.mix_bias,
        torch.addr(found.vote_weight, v, kernel).view_as(w.conv3x3_weight),
        torch.addcmul(found.vote_bias, v, logits),
        found.gn_weight,
        found.gn_bias + torch._softmax_backward_data(dv, v, 0, dv.dtype),
    )
