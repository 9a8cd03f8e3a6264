"""What forward and backward of `passes` share: folded weights, pools, gates, convolutions.

B batch, G groups, n channels of a group, H height, W width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.formula import constant_channel_weights
from ema_timm.ops.weights import EmaWeights, FoldedWeights


class PassesSaved(NamedTuple):
    """What the backward needs beyond the input and the weights.

    Attributes:
        pooled: What `pool` gives; empty where it is better taken again than kept.
        gate_map: A = sigmoid(L), (B, G, H, W).
        mean: Of scale·y, (B, G, n).
        r: 1/std of scale·y, (B, G, n).
        u: (B, G, n).
        coef: u·γ·r, (B, G, n).
        means: `shifted_means_reversed`, (B·G, 9n), in the type of the map.
        taps: k in the type of the map, (n, 9).
    """

    pooled: Tensor
    gate_map: Tensor
    mean: Tensor
    r: Tensor
    u: Tensor
    coef: Tensor
    means: Tensor
    taps: Tensor


class Rows(NamedTuple):
    """What the first passes over a map give.

    Attributes:
        pooled: What `pool` gives, (B, G, n, H + W + 1).
        gates: Gates along H and W, and that of the whole mean, (B, G, n, H + W + 1).
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
        return self.gates[..., self.deviation.shape[3] : -1]


def fold_in_few_operators(w: EmaWeights) -> FoldedWeights:
    """`ema_timm.ops.formula.fold` for a GPU, where each operator is a launch, however small.

    The operators of that one are more, but converters know them.
    """
    return fold_with_v(w)[0]


def fold_with_v(w: EmaWeights) -> tuple[FoldedWeights, Tensor]:
    """`fold_in_few_operators`, and v, the softmax of β, (n,)."""
    n = w.gn_bias.shape[0]
    v = constant_channel_weights(w.gn_bias)
    # A product with one vector is never rounded to TF32.
    kernel = torch.mv(w.conv3x3_weight.reshape(n, 9 * n).t(), v)
    weights = FoldedWeights(
        w.conv1x1_weight.reshape(n, n),
        w.conv1x1_bias,
        kernel.view(n, 9).t(),
        w.conv3x3_weight.reshape(n, 9 * n),
        w.conv3x3_bias,
        w.gn_weight,
        w.gn_bias + torch.dot(v, w.conv3x3_bias),
    )
    return weights, v


def gated_rows(g: Tensor, pooled: Tensor, mix_weight: Tensor, mix_bias: Tensor) -> Rows:
    """Gates, and the map of deviations, from the means that `pool` gives and the 1×1 convolution.

    Args:
        g: (B, G, n, H, W).
        pooled: (B, G, n, H + W + 1).
        mix_weight: n·n numbers.
        mix_bias: (n,).
    """
    n, height = g.shape[2:4]
    gates = convolve(pooled.flatten(0, 1), mix_weight.reshape(n, n, 1), mix_bias)
    gates = gates.sigmoid_().view(pooled.shape)
    # κ only has to be near: the mean of a row times the gate of the whole mean, which is there, in
    # place of the mean of the gates.
    shift = pooled[..., :height] * gates[..., -1:]
    if scale(g) != 1:
        shift.mul_(scale(g))
    rows = Rows(pooled, gates, shift, torch.empty_like(g))
    seen = rows.gate_w[..., None, :]
    torch.addcmul(shift[..., None], g, seen, value=-scale(g), out=rows.deviation)
    return rows


def split(x: Tensor, groups: int) -> Tensor:
    """``x``, (B, C, H, W), seen as (B, G, n, H, W)."""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def scale(x: Tensor) -> float:
    """What keeps a difference of two numbers of the type of ``x`` within its range."""
    return 0.5 if x.dtype == torch.float16 else 1.0


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
    """Means of ``g``, (B, G, n, H, W), over rows, over columns, and whole: (B, G, n, H + W + 1)."""
    height, width = g.shape[3:]
    pooled = g.new_empty((*g.shape[:3], height + width + 1), dtype=dtype)
    torch.mean(g, 4, dtype=dtype, out=pooled[..., :height])
    torch.mean(g, 3, dtype=dtype, out=pooled[..., height:-1])
    torch.mean(pooled[..., :height], 3, out=pooled[..., -1])
    return pooled


def shifted_means_reversed(g: Tensor, pooled: Tensor) -> Tensor:
    """`ema_timm.ops.formula.shifted_means`, from the last tap to the first.

    The first, (dy, dx) = (1, 1), leaves out the first row and the first column. In this order the
    borders have the order of the map.

    Returns:
        (B, G, n, 3, 3).
    """
    height, width = g.shape[3:]
    row, col, whole = pooled.split([height, width, 1], -1)
    means = whole[..., None].repeat(1, 1, 1, 3, 3)
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
