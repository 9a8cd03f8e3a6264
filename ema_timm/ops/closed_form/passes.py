"""What forward and backward of `whole_map` share: views, pools, gates, convolutions.

B batch, G groups, n channels of a group, H height, W width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.weights import FoldedWeights


class Saved(NamedTuple):
    """What the backward needs beyond the input and the weights.

    Attributes:
        pooled: Means of rows and of columns, (B, G, n, H + W); empty where they are better taken
            again than kept.
        gate_map: A = sigmoid(L), (B, G, H, W).
        vectors: Mean of scale·y, 1/std of it, and u, (3, B, G, n).
        means: `shifted_means`, (B·G, 9n), in the type in which the backward multiplies them.
    """

    pooled: Tensor
    gate_map: Tensor
    vectors: Tensor
    means: Tensor


class Rows(NamedTuple):
    """What the first passes over a map give.

    Attributes:
        pooled: Means of rows and of columns, (B, G, n, H + W).
        gates: Gates along H and W, (B, G, n, H + W).
        shift: scale·κ, (B, G, n, H).
        deviation: e = scale·(κ − g·s_w), (B, G, n, H, W), of the type and format of the input.
    """

    pooled: Tensor
    gates: Tensor
    shift: Tensor
    deviation: Tensor

    @property
    def gate_h(self) -> Tensor:
        """(B, G, n, H)."""
        return self.gates[..., : self.deviation.shape[3]]

    @property
    def gate_w(self) -> Tensor:
        """(B, G, n, W)."""
        return self.gates[..., self.deviation.shape[3] :]


def gated_rows(g: Tensor, pooled: Tensor, w: FoldedWeights) -> Rows:
    """Gates, and the map of deviations, from the means that `pool` gives."""
    height = g.shape[3]
    gates = convolve(pooled.flatten(0, 1), w.mix_weight[..., None], w.mix_bias)
    gates = gates.sigmoid_().view(pooled.shape)
    gate_w = gates[..., height:]
    shift = pooled[..., :height] * gate_w.mean(3, keepdim=True)
    if scale(g) != 1:
        shift.mul_(scale(g))
    deviation = torch.empty_like(g)
    torch.addcmul(shift[..., None], g, gate_w[..., None, :], value=-scale(g), out=deviation)
    return Rows(pooled, gates, shift, deviation)


def split(x: Tensor, groups: int) -> Tensor:
    """``x``, (B, C, H, W), seen as (B, G, n, H, W)."""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def scale(x: Tensor) -> float:
    """What keeps a difference of two numbers of the type of ``x`` within its range."""
    return 0.5 if x.dtype == torch.float16 else 1.0


def exact_type(x: Tensor) -> torch.dtype:
    """A type in which products for the parameters of ``x``'s layer are never rounded to TF32."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float64


def images(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """``x`` as a convolution of each group takes it without a copy, and the groups it then has.

    A contiguous map is B·G images of one group; others stay B images of G groups.
    """
    if x.is_contiguous():
        return x.view(-1, x.shape[1] // groups, *x.shape[2:]), 1
    return x, groups


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """A convolution of one or two dimensions that never rounds float32 to TF32."""
    ones, cudnn = [1] * (x.dim() - 2), torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return torch._convolution(
        x,
        weight,
        bias,
        ones,
        [padding] * len(ones),
        ones,
        transposed,
        [0] * len(ones),
        groups,
        cudnn.benchmark,
        deterministic,
        cudnn.enabled,
        False,  # allow_tf32
    )


def pool(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Means of rows, then of columns, of ``g``, (B, G, n, H, W): (B, G, n, H + W)."""
    height, width = g.shape[3:]
    pooled = g.new_empty((*g.shape[:3], height + width), dtype=dtype)
    torch.mean(g, 4, dtype=dtype, out=pooled[..., :height])
    torch.mean(g, 3, dtype=dtype, out=pooled[..., height:])
    return pooled


def shifted_means(g: Tensor, pooled: Tensor) -> Tensor:
    """`ema_timm.ops.closed_form.formula.shifted_means`, from the last tap to the first.

    The first, (dy, dx) = (1, 1), leaves out the first row and the first column: in this order the
    borders stand as they do in the map.

    Returns:
        (B, G, n, 3, 3).
    """
    height, width = g.shape[3:]
    row, col = pooled[..., :height], pooled[..., height:]
    means = row[..., None, None, :].expand(*row.shape[:3], 3, 3, height).mean(-1)
    means[..., ::2, :].sub_(_both(ends(row, -1), -1)[..., None], alpha=1 / height)
    means[..., ::2].sub_(_both(ends(col, -1), -1)[..., None, :], alpha=1 / width)
    corners = _both(_both(ends(ends(g, -1), -2), -1), -2)
    means[..., ::2, ::2].add_(corners, alpha=1 / (height * width))
    return means


def ends(t: Tensor, dim: int) -> Tensor:
    """A view of the first and the last of ``t`` along ``dim``, -1 or -2; of one where they meet."""
    step = slice(None, None, max(1, t.shape[dim] - 1))
    return t[..., step] if dim == -1 else t[..., step, :]


def _both(t: Tensor, dim: int) -> Tensor:
    """`ends` as two, also where they meet."""
    size = list(t.shape)
    size[dim] = 2
    return t.expand(size)
