"""What the Triton kernels of EMA attention work out: the derivation's steps, on blocks.

Letters, bundles and loads are those of `ema_timm.ops.fused.bundles`, identities a to d those of
`ema_timm.ops.closed_form.formula`; tap (dy, dx) has index 3·(dy + 1) + dx + 1. Nine taps lie in
16 columns, at t.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.fused.bundles import load_block, load_matrix, load_plane, load_vector

EPS = tl.constexpr(1e-5)  # that of `ema_timm.ops.weights`; kernels see constants of this file only


@triton.jit
def mix(weight, bias, pooled):
    """Gates of pooled rows or columns (BN, P): the shared 1×1 convolution and its sigmoid."""
    mixed = tl.sum(weight[:, :, None] * pooled[None, :, :], axis=1)
    return tl.sigmoid(mixed + bias[:, None])


@triton.jit
def centred(block, gate_h, gate_w, mean, rest):
    """Y − μ, (BN, BH, BW), from gates (BN, BH) and (BN, BW)."""
    y = block * gate_h[:, :, None] * gate_w[:, None, :]
    return (y - mean[:, None, None]) - rest[:, None, None]


class Slope(NamedTuple):
    """What `norm_gradient` needs of the whole tile.

    Attributes:
        coef: uγr, (BN,).
        slope: r·mean(dL·ŷ), (BN,).
        dl_mean: Mean of dL, one number.
    """

    coef: Any
    slope: Any
    dl_mean: Any


@triton.jit
def norm_gradient(y, dl, of):
    """Dy = uγr·(dL − mean dL − ŷ·mean(dL·ŷ)), (BN, BH, BW), from y − μ and dL (BH, BW)."""
    return of.coef[:, None, None] * ((dl - of.dl_mean)[None, :, :] - y * of.slope[:, None, None])


@triton.jit
def spread(dl, kernel, x, c, h, w):
    """The transposed convolution of dL, (H, W), with the collapsed kernel: (BN, BH, BW)."""
    found = tl.zeros((c.shape[0], h.shape[0], w.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        seen = load_plane(dl, x, h - (tap // 3 - 1), w - (tap % 3 - 1))
        found += load_vector(kernel + tap * x.n, c, x.n)[:, None, None] * seen[None, :, :]
    return found


@triton.jit
def kernel_gradient(dl, x, block, h, w, t):
    """A block's share of dk, (BN, 16): what each tap saw of x, weighed by dL, (H, W)."""
    dk = tl.zeros((block.shape[0], 16), tl.float32)
    for tap in tl.static_range(9):
        seen = load_plane(dl, x, h - (tap // 3 - 1), w - (tap % 3 - 1))
        share = tl.sum(tl.sum(block * seen[None, :, :], axis=2), axis=1)
        dk += tl.where(t[None, :] == tap, share[:, None], 0.0)
    return dk


@triton.jit
def pick(matrix, t, index):
    """Column ``index`` of (BN, 16)."""
    return tl.sum(tl.where(t[None, :] == index, matrix, 0.0), axis=1)


@triton.jit
def sum_taps(taps, chosen):
    """Sum of some taps, (BN,)."""
    return tl.sum(tl.where(chosen[None, :], taps, 0.0), axis=1)


@triton.jit
def pick_corner(row, w, index):
    """One pixel a channel out of a row of pixels (BN, BW)."""
    return tl.sum(tl.where(w[None, :] == index, row, 0.0), axis=1)


@triton.jit
def shifted_means(x, col_sum, c, w, t):
    """Identity c: what each tap of a zero-padded 3×3 kernel sees in the mean, (BN, 16).

    From column sums (BN, BW), which hold the whole width, and the border rows of the tile.
    """
    edge = tl.arange(0, 1)
    first, last = load_block(x, c, edge, w), load_block(x, c, edge + x.H - 1, w)
    first_row, last_row = tl.sum(first, axis=1), tl.sum(last, axis=1)
    first_col, last_col = pick_corner(col_sum, w, 0), pick_corner(col_sum, w, x.W - 1)
    dy = (t // 3 - 1)[None, :]
    dx = (t % 3 - 1)[None, :]
    sums = tl.sum(col_sum, axis=1)[:, None] + tl.zeros_like(t)[None, :].to(tl.float32)
    sums -= tl.where(dy < 0, tl.sum(last_row, axis=1)[:, None], 0.0)
    sums -= tl.where(dy == 1, tl.sum(first_row, axis=1)[:, None], 0.0)
    sums -= tl.where(dx < 0, last_col[:, None], 0.0)
    sums -= tl.where(dx > 0, first_col[:, None], 0.0)
    sums += tl.where((dy < 0) & (dx < 0), pick_corner(last_row, w, x.W - 1)[:, None], 0.0)
    sums += tl.where((dy < 0) & (dx > 0), pick_corner(last_row, w, 0)[:, None], 0.0)
    sums += tl.where((dy == 1) & (dx < 0), pick_corner(first_row, w, x.W - 1)[:, None], 0.0)
    sums += tl.where((dy == 1) & (dx > 0), pick_corner(first_row, w, 0)[:, None], 0.0)
    return tl.where(t[None, :] < 9, sums / (x.H * x.W), 0.0)


@triton.jit
def vote(means, weight, bias, c, t, n: tl.constexpr, DROPPED: tl.constexpr):
    """The softmax weights u of the local branch, (BN,), from shifted means (BN, 16).

    ``weight`` is (n - DROPPED, n, 9): with one row dropped, channel 0 votes 0.
    """
    voter = (c >= DROPPED) & (c < n)
    logits = tl.load(bias + c - DROPPED, mask=voter, other=0.0)
    at = (c[:, None] - DROPPED) * (9 * n) + c[None, :] * 9
    for tap in tl.static_range(9):
        row = tl.load(weight + at + tap, mask=voter[:, None] & (c < n)[None, :], other=0.0)
        logits += tl.sum(row * pick(means, t, tap)[None, :], axis=1)
    logits = tl.where(c < n, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return weights / tl.sum(weights, axis=0)


@triton.jit
def softmax_gradient(u, du):
    """Dm = u·(du − u·du), (BN,)."""
    return u * (du - tl.sum(u * du, axis=0))


@triton.jit
def spread_votes(dm, vote_weight, x, c, t, n: tl.constexpr):
    """What reaches x through each tap of the shifted means, (BN, 16); votes are (n, n, 9)."""
    taps = tl.zeros((c.shape[0], 16), tl.float32)
    for tap in tl.static_range(9):
        votes = load_matrix(vote_weight + tap, c, n, 9 * n, 9)
        back = tl.sum(votes * dm[:, None], axis=0) / (x.H * x.W)
        taps += tl.where(t[None, :] == tap, back[:, None], 0.0)
    return taps


@triton.jit
def without_ends(lines, first, last, p, P):
    """``lines`` (BN, BP), less ``first`` (BN,) at position 0 and ``last`` at position P − 1."""
    lines -= tl.where((p == 0)[None, :], first[:, None], 0.0)
    return lines - tl.where((p == P - 1)[None, :], last[:, None], 0.0)


@triton.jit
def at_ends(first, last, p, P):
    """``first`` (BN,) at position 0 and ``last`` at position P − 1, zero between: (BN, BP)."""
    lines = tl.where((p == 0)[None, :], first[:, None], 0.0)
    return lines + tl.where((p == P - 1)[None, :], last[:, None], 0.0)


@triton.jit
def shift_columns(plane, w, BY: tl.constexpr, BW: tl.constexpr):
    """``plane`` (BH, BW) read at column w + BY, zero outside the block; BY is -1 or 1."""
    source = w + BY
    at = tl.minimum(tl.maximum(source, 0), BW - 1)
    moved = tl.gather(plane, tl.broadcast_to(at[None, :], plane.shape), axis=1)
    return tl.where(((source >= 0) & (source < BW))[None, :], moved, 0.0)
