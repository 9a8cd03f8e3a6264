"""The backward of `chunks` on one chunk, step by step in the order of the derivation.

The collapsed 3×3 convolution of both directions is here too. T tiles of one chunk, n channels of a
group, H height, W width; ŷ = (y − mean)·r.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.formula import shifted_means
from ema_timm.ops.saved import Saved
from ema_timm.ops.weights import FoldedWeights


class TileSums:
    """Parameter gradients, summed over tiles; n the channels of a group."""

    def __init__(self, like: FoldedWeights):
        self.mix = torch.zeros_like(like.mix_weight)  # (n, n)
        self.mix_bias = torch.zeros_like(like.mix_bias)
        self.kernel = torch.zeros_like(like.kernel)  # (9, n)
        self.vote_weight = torch.zeros_like(like.vote_weight)  # (n, 9n): Σ dm ⊗ means
        self.vote_bias = torch.zeros_like(like.vote_bias)
        self.gn_weight = torch.zeros_like(like.gn_weight)
        self.gn_bias = torch.zeros_like(like.gn_bias)
        self.logits = torch.zeros_like(like.gn_bias[:1])

    def folded(self) -> FoldedWeights:
        """As gradients of the folded parameters."""
        return FoldedWeights(
            self.mix,
            self.mix_bias,
            self.kernel,
            self.vote_weight,
            self.vote_bias,
            self.gn_weight,
            self.gn_bias,
        )


class _Chunk(NamedTuple):
    """One chunk in the type of the statistics.

    Attributes:
        g: The input, (T, n, H, W).
        grad: D, the gradient of the output, (T, n, H, W).
        gates: Gates along H and W, (T, n, H + W).
        gate_map: A, (T, H, W).
        mean: Mean of y, (T, n).
        rest: What the rounding of the mean leaves, (T, n).
        r: 1/std of y, (T, n).
        u: (T, n).
    """

    g: Tensor
    grad: Tensor
    gates: Tensor
    gate_map: Tensor
    mean: Tensor
    rest: Tensor
    r: Tensor
    u: Tensor

    @property
    def gate_h(self) -> Tensor:
        """(T, n, H)."""
        return self.gates[..., : self.g.shape[2]]

    @property
    def gate_w(self) -> Tensor:
        """(T, n, W)."""
        return self.gates[..., self.g.shape[2] :]


def backward_chunk(
    g: Tensor, grad: Tensor, saved: Saved, w: FoldedWeights, dg: Tensor | None, total: TileSums
) -> None:
    """The gradients of one chunk.

    Args:
        g: The input, (T, n, H, W), of any type.
        grad: The gradient of the output, (T, n, H, W).
        saved: What the forward kept of these T tiles.
        w: Folded parameters in the type of the statistics.
        dg: Takes the gradient of ``g``, (T, n, H, W); None where it is not needed.
        total: Takes this chunk's share of the parameters' gradients.
    """
    dtype = w.gn_weight.dtype
    c = _Chunk(g.to(dtype), grad.to(dtype), saved.gates, saved.gate_map, *saved.vectors)
    row, col = c.g.mean(3), c.g.mean(2)
    means = shifted_means(c.g, row, col)  # (T, n, 9)

    buffer = torch.mul(c.grad, c.g)  # serves as D·g, y and dy in turn
    dlogits = _gate_gradient(c, buffer)
    sum_dlogits = dlogits.sum((1, 2))[:, None]  # (T, 1)
    shifted = shifts(dlogits)  # (T, 9, HW): one stack serves both gradients of the convolution
    total.logits += sum_dlogits.sum(0)
    total.kernel += torch.matmul(shifted, c.g.flatten(2).mT).sum(0)

    dy, y_dot = _norm_gradient(c, w, dlogits, sum_dlogits, buffer)
    total.gn_weight += (c.u * y_dot).sum(0)
    total.gn_bias += (c.u * sum_dlogits).sum(0)

    dm = _cross_spatial_gradient(c, w, y_dot, sum_dlogits)
    total.vote_weight += dm.t() @ means.flatten(1)
    total.vote_bias += dm.sum(0)

    dmix = _mix_gradient(c, dy)
    total.mix += torch.matmul(dmix, torch.cat([row, col], -1).mT).sum(0)
    total.mix_bias += dmix.sum((0, 2))
    if dg is not None:
        dg.copy_(_input_gradient(c, w, shifted, dy, dm, dmix))


def _gate_gradient(c: _Chunk, product: Tensor) -> Tensor:
    """Through the gate: dL = (Σ_c D·g)·A·(1 − A), (T, H, W), from ``product`` = D·g."""
    return product.sum(1).mul_(c.gate_map).mul_(1 - c.gate_map)


def _norm_gradient(
    c: _Chunk, w: FoldedWeights, dlogits: Tensor, sum_dlogits: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """dy, (T, n, H, W), worked out in ``buffer``, and Σ dL·ŷ, (T, n)."""
    area = c.g.shape[2] * c.g.shape[3]
    y = torch.mul(c.g, c.gate_h[..., None], out=buffer).mul_(c.gate_w[..., None, :])
    y.sub_(c.mean[..., None, None]).sub_(c.rest[..., None, None])
    y_dot = torch.matmul(dlogits.view(-1, 1, area), y.flatten(2).mT)[:, 0] * c.r
    coef = c.u * w.gn_weight * c.r
    y.mul_((coef * c.r * y_dot / -area)[..., None, None])
    y.addcmul_(coef[..., None, None], dlogits[:, None])
    return y.sub_((coef * sum_dlogits / area)[..., None, None]), y_dot


def _cross_spatial_gradient(
    c: _Chunk, w: FoldedWeights, y_dot: Tensor, sum_dlogits: Tensor
) -> Tensor:
    """dm, (T, n), the gradient of the logits of u = softmax(means · W₃ + b₃)."""
    du = w.gn_weight * y_dot + w.gn_bias * sum_dlogits
    return c.u * (du - (c.u * du).sum(1, keepdim=True))


def _mix_gradient(c: _Chunk, dy: Tensor) -> Tensor:
    """Through the gates along H and W to the mixed pools, (T, n, H + W)."""
    product = dy * c.g
    dmix = torch.cat(
        [
            torch.matmul(product, c.gate_w[..., None])[..., 0],
            torch.matmul(c.gate_h[..., None, :], product)[..., 0, :],
        ],
        -1,
    )
    return dmix.mul_(c.gates).mul_(1 - c.gates)


def _input_gradient(
    c: _Chunk, w: FoldedWeights, shifted: Tensor, dy: Tensor, dm: Tensor, dmix: Tensor
) -> Tensor:
    """Sum up dg = D·A + dy·s_h·s_w + the transposed convolution + the pools, in place of dy."""
    height, width = c.g.shape[2:]
    # Everything that reaches a pixel through its row, its column or its corner.
    dtaps = (dm @ w.vote_weight).div_(height * width).view(*dm.shape, 3, 3)
    dpool = torch.matmul(w.mix_weight.t(), dmix)
    drow, dcol = dpool[..., :height] / width, dpool[..., height:] / height
    _spread_taps(dtaps, drow, dcol)

    acc = dy.mul_(c.gate_h[..., None]).mul_(c.gate_w[..., None, :])
    acc.addcmul_(c.grad, c.gate_map[:, None])
    acc.add_(drow[..., None]).add_(dcol[..., None, :])
    acc.add_(torch.matmul(w.kernel.t(), shifted).view(acc.shape))
    acc[..., -1, -1] += dtaps[..., 0, 0]
    acc[..., -1, 0] += dtaps[..., 0, 2]
    acc[..., 0, -1] += dtaps[..., 2, 0]
    acc[..., 0, 0] += dtaps[..., 2, 2]
    return acc


def _spread_taps(dtaps: Tensor, drow: Tensor, dcol: Tensor) -> None:
    """Add the gradients of the shifted means, except at the corners, to those of rows and columns.

    A tap reaches every pixel except the border row and column that its shift leaves out.

    Args:
        dtaps: Gradient of each tap's sum, (T, n, 3, 3).
        drow: The gradient that every pixel of a row receives, (T, n, H); changed in place.
        dcol: The same of every pixel of a column, (T, n, W); changed in place.
    """
    drow += dtaps.sum((2, 3))[..., None]
    drow[..., -1] -= dtaps[..., 0, :].sum(-1)
    drow[..., 0] -= dtaps[..., 2, :].sum(-1)
    dcol[..., -1] -= dtaps[..., :, 0].sum(-1)
    dcol[..., 0] -= dtaps[..., :, 2].sum(-1)


def add_convolution(logits: Tensor, g: Tensor, kernel: Tensor) -> None:
    """Add conv(g; k), zero-padded: nine products summed over channels, then shifted adds.

    Args:
        logits: (T, H, W); changed in place.
        g: (T, n, H, W).
        kernel: k, (9, n).
    """
    height, width = logits.shape[1:]
    taps = torch.matmul(kernel, g.flatten(2)).view(-1, 9, height, width)
    for t in range(9):
        dy, dx = t // 3 - 1, t % 3 - 1
        to_h, from_h = _overlap(dy, height)
        to_w, from_w = _overlap(dx, width)
        logits[:, to_h, to_w] += taps[:, t, from_h, from_w]


def shifts(dlogits: Tensor) -> Tensor:
    """``dlogits`` (T, H, W) as each tap of the transposed convolution sees it, (T, 9, HW)."""
    tiles, height, width = dlogits.shape
    out = dlogits.new_zeros((tiles, 9, height, width))
    for t in range(9):
        dy, dx = t // 3 - 1, t % 3 - 1
        to_h, from_h = _overlap(dy, height)
        to_w, from_w = _overlap(dx, width)
        out[:, t, from_h, from_w] = dlogits[:, to_h, to_w]
    return out.flatten(2)


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Where position p reads p + shift without leaving 0..size: slices of p and of p + shift."""
    low, high = max(0, -shift), max(0, size - max(0, shift))
    if low >= high:  # a map one pixel wide: the shift sees padding only
        return slice(0, 0), slice(0, 0)
    return slice(low, high), slice(low + shift, high + shift)
