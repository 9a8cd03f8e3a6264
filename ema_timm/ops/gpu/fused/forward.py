"""Triton kernel of EMA attention: the forward of one tile by one program.

Letters and arguments are those of `ema_timm.ops.gpu.fused.kernel_args`. The program makes four
passes over its tile: sums of rows and columns, statistics, gate, output. Only the first pass reads
the tile from memory; the later ones find it in the cache. A pass hands its results to the next one
in the tile's own part of ``saved``, and a barrier separates them. Programs share nothing.
Accumulators are float32.
"""

import triton
import triton.language as tl

from ema_timm.ops.gpu.fused.kernel_args import (
    Size,
    inside,
    load_columns,
    load_row_of,
    load_rows,
    load_vector,
    places,
    saved_of,
    store_lines,
    store_vector,
    tile_of,
    widened,
)
from ema_timm.ops.gpu.fused.steps import (
    centred,
    mean_of_columns,
    pool,
    shift_columns,
    store_means,
    sum_pixels,
)
from ema_timm.ops.saved import Saved
from ema_timm.ops.weights import FoldedWeights

EPS = tl.constexpr(1e-5)  # that of `ema_timm.ops.weights`; kernels see constants of this file only


@triton.jit
def forward_tile(
    x,
    out,
    saved: Saved,  # written; of the gate map that holds where SAVE
    sums,  # scratch: for each tile the sums of its lines, (n, L), then its shifted means, (9n,)
    weights: FoldedWeights,
    size: Size,
    n: tl.constexpr,
    SAVE: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,  # channels and rows of a block in passes of channel after channel
    BH: tl.constexpr,
    BC: tl.constexpr,  # the same in passes of row after row
    BR: tl.constexpr,
    BW: tl.constexpr,
    BA: tl.constexpr,
    BP: tl.constexpr,  # lines summed at once, of BA channels, and positions in them
    BQ: tl.constexpr,
    BL: tl.constexpr,  # lines mixed at once
    PN: tl.constexpr,  # the power of two that holds n
):
    """The forward of one tile: pools, gates and u, statistics, gate map, output. Grid (B·G,)."""
    x, out = tile_of(x, size, n, VECTOR, EVEN, LAST), tile_of(out, size, n, VECTOR, EVEN, LAST)
    saved = saved_of(saved, x, n)
    sums += tl.program_id(0).to(tl.int64) * n * (x.H + x.W + 9)
    means = sums + n * (x.H + x.W)
    # `statistics` puts means where the sums of channels lie
    pool(x, sums, saved.mean, n, LAST, BN, BH, BW, BA, BP, BQ)
    tl.debug_barrier()
    mix(x, sums, saved, weights, n, BL, PN)
    store_means(x, sums, saved.mean, means, n)
    tl.debug_barrier()
    cross_spatial_weights(means, saved, weights, n, PN)
    tl.debug_barrier()
    constant = statistics(x, saved, weights, sums, n, BN, BH, BW)
    tl.debug_barrier()
    w, rows = tl.arange(0, BW), tl.arange(0, BR)
    for h0 in range(0, x.H, BR):
        h = h0 + rows
        gate = gate_rows(x, saved, weights.kernel, sums, constant, h0, rows, w, n, BC, BW)
        for c0 in range(0, n, BC):
            c = c0 + tl.arange(0, BC)
            at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
            block = widened(tl.load(x.start + at, mask=mask, other=0.0))
            block *= gate[None, :, :]
            tl.store(out.start + at, block.to(out.start.dtype.element_ty), mask=mask)
        if SAVE:
            at = h[:, None] * x.W + w[None, :]
            tl.store(saved.gate_map + at, gate, mask=(h < x.H)[:, None] & (w < x.W)[None, :])


@triton.jit
def mix(x, sums, saved, weights, n: tl.constexpr, BL: tl.constexpr, PN: tl.constexpr):
    """Write the gates of all lines: the shared 1×1 convolution of their means, and its sigmoid."""
    o = tl.arange(0, PN)
    bias = load_vector(weights.mix_bias, o, n)
    L = x.H + x.W
    for p0 in range(0, L, BL):
        p = p0 + tl.arange(0, BL)
        mixed = tl.zeros((PN, BL), tl.float32)
        for i in range(n):
            pooled = tl.load(sums + i * x.lc + p * x.lp, mask=p < L, other=0.0)
            column = tl.load(weights.mix_weight + o * n + i, mask=o < n, other=0.0)
            mixed += column[:, None] * pooled[None, :]
        mixed *= tl.where(p < x.H, 1.0 / x.W, 1.0 / x.H)[None, :]
        store_lines(saved.gates, tl.sigmoid(mixed + bias[:, None]), x, o, 0, p, L, n)


@triton.jit
def cross_spatial_weights(means, saved, weights, n: tl.constexpr, PN: tl.constexpr):
    """Write u, the softmax weights of the local branch."""
    o = tl.arange(0, PN)
    products = tl.zeros((PN, 32), tl.float32)
    for k0 in range(0, 9 * n, 32):
        k = k0 + tl.arange(0, 32)
        at = o[:, None] * (9 * n) + k[None, :]
        mask = (o < n)[:, None] & (k < 9 * n)[None, :]
        row = tl.load(weights.vote_weight + at, mask=mask, other=0.0)
        products += row * load_vector(means, k, 9 * n)[None, :]
    logits = tl.sum(products, axis=1)
    logits += load_vector(weights.vote_bias, o, n)
    logits = tl.where(o < n, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0))
    store_vector(saved.u, powers / tl.sum(powers, axis=0), o, n)


@triton.jit
def statistics(
    x, saved, weights, known, n: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr
):
    """Write the mean of y, its rounding residual and 1/std of y; returns the constant term of L.

    ``known`` gets what `gate_rows` reads, for each channel: uγr and the mean.

    The statistics are shifted by the mean of the first rows. The mean of the tile is within
    sqrt(H / BH) standard deviations of it, so that the difference of squares does not cancel.
    """
    w, rows = tl.arange(0, BW), tl.arange(0, BH)
    constant = tl.zeros((BN,), tl.float32)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        at = places(x, c, rows, w)
        gate_w = load_columns(saved.gates, x, c, w, n)
        block = widened(tl.load(x.start + at, mask=inside(x, c, rows, w, n), other=0.0))
        y = block * load_rows(saved.gates, x, c, rows, n)[:, :, None] * gate_w[:, None, :]
        shift = sum_pixels(y) / (tl.minimum(BH, x.H) * x.W)
        shift_w = mean_of_columns(x, shift, w)
        rest = tl.zeros((BN, BH, BW), tl.float32)
        squares = tl.zeros((BN, BH, BW), tl.float32)
        for h0 in range(0, x.H, BH):
            h = h0 + rows
            mask = inside(x, c, h, w, n)
            block = widened(tl.load(x.start + h0 * x.h + at, mask=mask, other=0.0))
            y = centred(x, block, load_rows(saved.gates, x, c, h, n), gate_w, shift_w, h, h0)
            rest += y
            squares += y * y
        left = sum_pixels(rest) / (x.H * x.W)
        variance = sum_pixels(squares) / (x.H * x.W) - left * left
        store_vector(saved.mean, shift, c, n)
        store_vector(saved.rest, left, c, n)
        r = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
        store_vector(saved.r, r, c, n)
        u = load_vector(saved.u, c, n)
        coef = u * load_vector(weights.gn_weight, c, n) * r
        store_vector(known, coef, c, n)
        store_vector(known + n, shift, c, n)
        constant += u * load_vector(weights.gn_bias, c, n) - coef * left
    return tl.sum(constant, axis=0)


@triton.jit
def gate_rows(
    x,
    saved,
    kernel,
    known,
    constant,
    h0,
    rows,
    w,
    n: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    """A of the rows from ``h0`` on, (BH, BW): the norm and identity b meet in one map L.

    Channels are summed before columns are shifted, so a shift moves one map, not n.
    """
    left = tl.zeros((BC, rows.shape[0], BW), tl.float32)
    middle = tl.zeros((BC, rows.shape[0], BW), tl.float32)
    right = tl.zeros((BC, rows.shape[0], BW), tl.float32)
    h = h0 + rows
    for c0 in range(0, n, BC):
        c = c0 + tl.arange(0, BC)
        at = places(x, c, rows, w)
        coef, mean = load_row_of(known + c, 0, c, n), load_row_of(known + c, 1, c, n)
        gate_h = load_rows(saved.gates, x, c, h, n)
        gate_w = load_columns(saved.gates, x, c, w, n)
        for dy in tl.static_range(-1, 2):
            mask = inside(x, c, h + dy, w, n)
            if dy == -1:
                mask = mask & (h > 0)[None, :, None]
            near = widened(tl.load(x.start + (h0 + dy) * x.h + at, mask=mask, other=0.0))
            left += near * load_row_of(kernel + c, 3 * dy + 3, c, n)[:, None, None]
            middle += near * load_row_of(kernel + c, 3 * dy + 4, c, n)[:, None, None]
            right += near * load_row_of(kernel + c, 3 * dy + 5, c, n)[:, None, None]
            if dy == 0:
                y = near * gate_h[:, :, None] * gate_w[:, None, :] - mean[:, None, None]
                middle += y * coef[:, None, None]
    logits = tl.sum(middle, axis=0) + constant
    logits += shift_columns(tl.sum(left, axis=0), w, -1, BW)
    logits += shift_columns(tl.sum(right, axis=0), w, 1, BW)
    return tl.sigmoid(logits)
