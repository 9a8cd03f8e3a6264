"""Triton kernels of EMA attention: one program takes one tile from the first pass to the last.

Letters and bundles are those of `ema_timm.ops.fused.bundles`. Here a block is all channels of the
tile, BH rows and the whole width, each rounded up to a power of two; a tile is walked in steps of
BH rows. Only the first walk reads the tile from memory, the later ones find it in cache.
Accumulators are float32.

Nothing here is shared between programs: every output number is written by one program, once.
`ema_timm.ops.fused.split_tile` has the kernels for tiles that do not suit one program.
"""

import triton
import triton.language as tl

from ema_timm.ops.closed_form.saved import Saved
from ema_timm.ops.fused.blocks import (
    EPS,
    centred,
    mix,
    shift_columns,
    shifted_means,
    vote,
)
from ema_timm.ops.fused.bundles import (
    Map,
    Size,
    aligned_size,
    inside,
    kept_of,
    load_block,
    load_matrix,
    load_vector,
    store_block,
    store_lines,
    store_plane,
    tile_of,
)
from ema_timm.ops.weights import FoldedWeights


@triton.jit
def forward_tile(
    x: Map,
    out: Map,
    saved: Saved,  # written where SAVE
    weights: FoldedWeights,  # the first DROPPED of the votes' n rows are left out
    size: Size,
    n: tl.constexpr,
    DROPPED: tl.constexpr,
    SAVE: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """The whole forward of one tile: pool, vote and centre, gate. Grid (B·G,)."""
    size = aligned_size(size, VECTOR, LAST)
    x, out = tile_of(x, size, n, VECTOR, LAST), tile_of(out, size, n, VECTOR, LAST)
    c, w, t = tl.arange(0, BN), tl.arange(0, BW), tl.arange(0, 16)
    w1, b1 = load_matrix(weights.mix_weight, c, n, n, 1), load_vector(weights.mix_bias, c, n)

    col_sum = sum_columns(x, c, w, BH)
    gate_w = mix(w1, b1, col_sum / size.H)
    means = shifted_means(x, col_sum, c, w, t)
    u = vote(means, weights.vote_weight, weights.vote_bias, c, t, n, DROPPED)
    mean, rest, r = statistics(x, w1, b1, gate_w, c, w, BH)

    # The norm and the collapsed convolution meet in one map L.
    coef = u * load_vector(weights.gn_weight, c, n) * r
    constant = tl.sum(u * load_vector(weights.gn_bias, c, n), axis=0)
    kept = kept_of(saved, size, n)
    for h0 in range(0, size.H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(x, c, h, w)
        gate_h = mix(w1, b1, tl.sum(block, axis=2) / size.W)
        y = centred(block, gate_h, gate_w, mean, rest)
        logits = tl.sum(y * coef[:, None, None], axis=0) + constant
        gate = tl.sigmoid(add_convolution(logits, x, block, weights.kernel, c, h, w, BW))
        store_block(out, block * gate[None, :, :], c, h, w)
        if SAVE:
            store_plane(kept.gate_map, x, gate, h, w)
            store_lines(kept.gates, gate_h, c, h, n, size.H, size.H + size.W)
    if SAVE:
        store_lines(kept.gates + size.H, gate_w, c, w, n, size.W, size.H + size.W)
        tl.store(kept.mean + c, mean, mask=c < n)
        tl.store(kept.rest + c, rest, mask=c < n)
        tl.store(kept.r + c, r, mask=c < n)
        tl.store(kept.u + c, u, mask=c < n)


@triton.jit
def sum_columns(x, c, w, BH: tl.constexpr):
    """Sums of the tile along H, (BN, BW).

    A row is whole within one step, so its mean needs no memory.
    """
    col_sum = tl.zeros((c.shape[0], w.shape[0]), tl.float32)
    for h0 in range(0, x.H, BH):
        col_sum += tl.sum(load_block(x, c, h0 + tl.arange(0, BH), w), axis=1)
    return col_sum


@triton.jit
def statistics(x, w1, b1, gate_w, c, w, BH: tl.constexpr):
    """Mean of y, what its rounding leaves, and 1/std of y, (BN,) each.

    Shifted by the mean of the first step: the whole mean lies within sqrt(H / BH) standard
    deviations of it, so the difference of squares cancels no more.
    """
    shift = tl.zeros((c.shape[0],), tl.float32)
    rest = tl.zeros((c.shape[0],), tl.float32)
    squares = tl.zeros((c.shape[0],), tl.float32)
    for h0 in range(0, x.H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(x, c, h, w)
        gate_h = mix(w1, b1, tl.sum(block, axis=2) / x.W)
        y = block * gate_h[:, :, None] * gate_w[:, None, :]
        if h0 == 0:
            shift = tl.sum(tl.sum(y, axis=2), axis=1) / (tl.minimum(BH, x.H) * x.W)
        y = tl.where(inside(x, c, h, w), y - shift[:, None, None], 0.0)
        rest += tl.sum(tl.sum(y, axis=2), axis=1)
        squares += tl.sum(tl.sum(y * y, axis=2), axis=1)
    rest = rest / (x.H * x.W)
    r = tl.rsqrt(tl.maximum(squares / (x.H * x.W) - rest * rest, 0.0) + EPS)
    return shift, rest, r


@triton.jit
def add_convolution(logits, x, block, kernel, c, h, w, BW: tl.constexpr):
    """Identity b: ``logits`` (BH, BW) and the collapsed convolution of the tile around ``block``.

    Channels are summed before columns are shifted, so a shift moves one map, not n.
    """
    left = tl.zeros((h.shape[0], BW), tl.float32)
    right = tl.zeros((h.shape[0], BW), tl.float32)
    for dy in tl.static_range(-1, 2):
        near = block
        if dy != 0:
            near = load_block(x, c, h + dy, w)
        taps = kernel + 3 * (dy + 1) * x.n
        left += tl.sum(near * load_vector(taps, c, x.n)[:, None, None], axis=0)
        logits += tl.sum(near * load_vector(taps + x.n, c, x.n)[:, None, None], axis=0)
        right += tl.sum(near * load_vector(taps + 2 * x.n, c, x.n)[:, None, None], axis=0)
    return logits + (shift_columns(left, w, -1, BW) + shift_columns(right, w, 1, BW))
