"""The closed form without autograd: forward and backward passes written for the eager CPU.

Same identities as `ema_timm.ops.closed_form.formula`, other loops. A (sample, group) tile is
independent of every other, so the work is cut into chunks of tiles that stay in cache from the
first pass to the last: the maps between two passes are never larger than one chunk.

T tiles of one chunk, n channels of a group, H height, W width. README.md here has the
measurements behind each choice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.closed_form.formula import fold, shifted_means, vote
from ema_timm.ops.weights import EPS, EmaWeights, FoldedWeights

CHUNK = 1 << 19
"""Numbers of the input in one chunk, 2 MiB in float32."""


class Saved(NamedTuple):
    """What the backward needs beyond the input and the weights; BG = B·G tiles.

    Attributes:
        gates: Gates along H and W, (BG, n, H + W).
        gate_map: A = sigmoid(L), (BG, H, W).
        vectors: Mean of y, what its rounding leaves, 1/std of y, and u, (4, BG, n).
    """

    gates: Tensor
    gate_map: Tensor
    vectors: Tensor


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """Gate ``x``.

    Args:
        x: (B, C, H, W), floating point, any strides.
        weights: Folded parameters in the type of the statistics.
        groups: G; divides C.
        save: Whether a backward will follow.

    Returns:
        The gated map, laid out like ``x``, and what `backward` needs, or None.
    """
    out = torch.empty_like(x)
    saved = None
    if save:
        saved = new_saved(x, groups, weights.gn_weight.dtype)
    for tiles, g, gated in _chunks(groups, x, out):
        kept = _forward_chunk(g, weights, gated)
        if saved is not None:
            saved.gates[tiles], saved.gate_map[tiles] = kept[0], kept[1]
            saved.vectors[:, tiles] = kept[2]
    return out, saved


def _forward_chunk(g: Tensor, w: FoldedWeights, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: ``g`` (T, n, H, W) to ``out``; returns gates, gate map and vectors."""
    g = g.to(w.gn_weight.dtype)
    height, width = g.shape[2], g.shape[3]
    row, col = g.mean(3), g.mean(2)  # (T, n, H), (T, n, W)
    gates = torch.matmul(w.mix_weight, torch.cat([row, col], -1)).add_(w.mix_bias[:, None])
    gates.sigmoid_()
    gate_h, gate_w = gates[..., :height, None], gates[..., None, height:]

    y = torch.mul(g, gate_h).mul_(gate_w)
    mean = y.mean((2, 3), keepdim=True)
    y.sub_(mean)
    # The rounded mean leaves a rest, which r would magnify 316 times on a constant channel.
    rest = y.mean((2, 3))
    # The norm of the centred map: var_mean needs many times as long for the same number.
    var = torch.linalg.vector_norm(y, dim=(2, 3)).square_().div_(height * width)
    r = var.sub_(rest.square()).clamp_(min=0).add_(EPS).rsqrt_()
    u = vote(shifted_means(g, row, col).flatten(1), w)  # (T, n)

    coef = u * w.gn_weight * r
    logits = torch.matmul(coef[:, None], _flat(y)).view(-1, height, width)
    del y
    _add_convolution(logits, g, w.kernel)
    logits.add_((u @ w.gn_bias - (coef * rest).sum(1))[:, None, None])
    gate_map = logits.sigmoid_()
    if g.dtype == out.dtype:
        torch.mul(g, gate_map[:, None], out=out)
    else:
        out.copy_(g.mul_(gate_map[:, None]))  # g is a copy in the type of the statistics
    return gates, gate_map, torch.stack([mean[..., 0, 0], rest, r, u])


def backward(
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    weights: EmaWeights,
    groups: int,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, EmaWeights | None]:
    """Gradients of `forward` in closed form.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        x: The input, (B, C, H, W).
        saved: From `forward`.
        weights: Parameters in the type of the statistics.
        groups: G.
        need_x: Whether the gradient of ``x`` is wanted.
        need_weights: Whether the gradients of the parameters are wanted.

    Returns:
        The gradient of ``x`` in its type and layout, and those of the parameters; None where not
        wanted.
    """
    folded = fold(weights)
    dx = torch.empty_like(x) if need_x else None
    total = _TileSums(folded)
    for tiles, g, d, dg in _chunks(groups, x, grad, dx):
        kept = saved.gates[tiles], saved.gate_map[tiles], saved.vectors[:, tiles]
        _backward_chunk(g, d, kept, folded, dg, total)
    return dx, finish_weights(total.folded(), total.logits, weights) if need_weights else None


class _TileSums:
    """Parameter gradients, summed over tiles; n the channels of a group."""

    def __init__(self, like: FoldedWeights):
        self.mix = torch.zeros_like(like.mix_weight)  # (n, n)
        self.mix_bias = torch.zeros_like(like.mix_bias)
        self.kernel = torch.zeros_like(like.kernel)  # (9, n)
        self.votes = torch.zeros_like(like.vote_weight)  # (n, 9n): Σ dm ⊗ means
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
            self.votes,
            self.vote_bias,
            self.gn_weight,
            self.gn_bias,
        )


def finish_weights(found: FoldedWeights, logits: Tensor, w: EmaWeights) -> EmaWeights:
    """From the gradients of the folded parameters to those of the layer's own.

    Args:
        found: Gradients through the votes, the mixing, the norm and k; β without its part in v.
        logits: The sum of dL over everything, (1,).
        w: The layer's parameters in the type of the statistics.
    """
    n = w.gn_bias.shape[0]
    v = w.gn_bias.softmax(0)
    kernel = found.kernel.t().reshape(9 * n)
    dv = w.conv3x3_weight.reshape(n, 9 * n) @ kernel + w.conv3x3_bias * logits
    return EmaWeights(
        found.mix_weight.view_as(w.conv1x1_weight),
        found.mix_bias,
        torch.addr(found.vote_weight, v, kernel).view_as(w.conv3x3_weight),
        v * logits + found.vote_bias,
        found.gn_weight,
        found.gn_bias + v * (dv - v @ dv),
    )


def _backward_chunk(g, grad, kept, w: FoldedWeights, dg: Tensor | None, total: _TileSums) -> None:
    """One chunk: ``g`` and ``grad`` (T, n, H, W) to ``dg``, and its share of the tile sums."""
    dtype = w.gn_weight.dtype
    g, grad = g.to(dtype), grad.to(dtype)
    gates, gate_map, (mean, rest, r, u) = kept
    height, width = g.shape[2], g.shape[3]
    area = height * width
    gate_h, gate_w = gates[..., :height], gates[..., height:]
    row, col = g.mean(3), g.mean(2)
    means = shifted_means(g, row, col)  # (T, n, 9)

    # Through the gate: dL = (Σ_c D·g)·A·(1 − A).
    buffer = torch.mul(grad, g)
    dlogits = buffer.sum(1).mul_(gate_map).mul_(1 - gate_map)  # (T, H, W)
    sum_dlogits = dlogits.sum((1, 2))[:, None]  # (T, 1)
    total.logits += sum_dlogits.sum(0)

    # Local branch: one stack of shifted maps serves both gradients of the convolution.
    shifted = _shifts(dlogits)  # (T, 9, HW)
    total.kernel += torch.matmul(shifted, _flat(g).mT).sum(0)

    # Norm branch, ŷ = (y − mean)·r.
    y = torch.mul(g, gate_h[..., None], out=buffer).mul_(gate_w[..., None, :])
    y.sub_(mean[..., None, None]).sub_(rest[..., None, None])
    y_dot = torch.matmul(dlogits.view(-1, 1, area), _flat(y).mT)[:, 0] * r  # Σ dL·ŷ, (T, n)
    coef = u * w.gn_weight * r
    y.mul_((coef * r * y_dot / -area)[..., None, None])
    y.addcmul_(coef[..., None, None], dlogits[:, None])
    dy = y.sub_((coef * sum_dlogits / area)[..., None, None])
    total.gn_weight += (u * y_dot).sum(0)
    total.gn_bias += (u * sum_dlogits).sum(0)

    # Votes: u = softmax(means · W₃ + b₃).
    du = w.gn_weight * y_dot + w.gn_bias * sum_dlogits
    dm = u * (du - (u * du).sum(1, keepdim=True))
    total.votes += dm.t() @ means.flatten(1)
    total.vote_bias += dm.sum(0)

    # Gates along H and W, and the 1×1 convolution that mixes the channels.
    product = dy * g
    dmix = torch.cat(
        [
            torch.matmul(product, gate_w[..., None])[..., 0],
            torch.matmul(gate_h[..., None, :], product)[..., 0, :],
        ],
        -1,
    )
    del product
    dmix.mul_(gates).mul_(1 - gates)  # (T, n, H + W)
    total.mix += torch.matmul(dmix, torch.cat([row, col], -1).mT).sum(0)
    total.mix_bias += dmix.sum((0, 2))
    if dg is None:
        return

    # Everything that reaches a pixel through its row, its column or its corner.
    dtaps = (dm @ w.vote_weight).div_(area).view(*dm.shape, 3, 3)
    dpool = torch.matmul(w.mix_weight.t(), dmix)
    drow, dcol = dpool[..., :height] / width, dpool[..., height:] / height
    spread_taps(dtaps, drow, dcol)

    acc = dy.mul_(gate_h[..., None]).mul_(gate_w[..., None, :])
    acc.addcmul_(grad, gate_map[:, None])
    acc.add_(drow[..., None]).add_(dcol[..., None, :])
    acc.add_(torch.matmul(w.kernel.t(), shifted).view(acc.shape))
    acc[..., -1, -1] += dtaps[..., 0, 0]
    acc[..., -1, 0] += dtaps[..., 0, 2]
    acc[..., 0, -1] += dtaps[..., 2, 0]
    acc[..., 0, 0] += dtaps[..., 2, 2]
    dg.copy_(acc)


def spread_taps(dtaps: Tensor, drow: Tensor, dcol: Tensor) -> None:
    """Add the gradients of the shifted means, but for the corners, to those of rows and columns.

    A tap reaches every pixel but the border row and column that its shift leaves out.

    Args:
        dtaps: Gradient of each tap's sum, (T, n, 3, 3).
        drow: What every pixel of a row receives, (T, n, H); changed in place.
        dcol: What every pixel of a column receives, (T, n, W); changed in place.
    """
    drow += dtaps.sum((2, 3))[..., None]
    drow[..., -1] -= dtaps[..., 0, :].sum(-1)
    drow[..., 0] -= dtaps[..., 2, :].sum(-1)
    dcol[..., -1] -= dtaps[..., :, 0].sum(-1)
    dcol[..., 0] -= dtaps[..., :, 2].sum(-1)


def _chunks(groups: int, *maps: Tensor | None) -> Iterator[tuple]:
    """Cut maps of one shape (B, C, H, W) into (slice of tiles, *views of (T, n, H, W)).

    Contiguous maps are cut anywhere between tiles. In other layouts the tiles of two samples have
    no common stride, so a sample is the largest chunk.
    """
    first = maps[0]
    batch, channels, height, width = first.shape
    n = channels // groups
    # A GPU hides nothing in its cache that would pay for launching every operator many times.
    size = CHUNK if first.device.type == "cpu" else first.numel()
    step = max(1, size // max(1, n * height * width))
    if all(m is None or m.is_contiguous() for m in maps):
        flat = [m if m is None else m.view(batch * groups, n, height, width) for m in maps]
        for i in range(0, batch * groups, step):
            tiles = slice(i, min(i + step, batch * groups))
            yield tiles, *[m if m is None else m[tiles] for m in flat]
        return
    for b in range(batch):
        sample = [m if m is None else m[b].unflatten(0, (groups, n)) for m in maps]
        for i in range(0, groups, step):
            j = min(i + step, groups)
            yield (
                slice(b * groups + i, b * groups + j),
                *[m if m is None else m[i:j] for m in sample],
            )


def new_saved(x: Tensor, groups: int, dtype: torch.dtype) -> Saved:
    """Memory for what the backward of ``x``, (B, C, H, W), will need."""
    batch, channels, height, width = x.shape
    tiles, n = batch * groups, channels // groups
    return Saved(
        x.new_empty((tiles, n, height + width), dtype=dtype),
        x.new_empty((tiles, height, width), dtype=dtype),
        x.new_empty((4, tiles, n), dtype=dtype),
    )


def _flat(g: Tensor) -> Tensor:
    return g.flatten(2)


def _add_convolution(logits: Tensor, g: Tensor, kernel: Tensor) -> None:
    """Add conv(g; k), zero-padded, to ``logits`` (T, H, W): nine products, then shifted adds."""
    height, width = logits.shape[1:]
    taps = torch.matmul(kernel, _flat(g)).view(-1, 9, height, width)
    for t in range(9):
        dy, dx = t // 3 - 1, t % 3 - 1
        to_h, from_h = _overlap(dy, height)
        to_w, from_w = _overlap(dx, width)
        logits[:, to_h, to_w] += taps[:, t, from_h, from_w]


def _shifts(dlogits: Tensor) -> Tensor:
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
