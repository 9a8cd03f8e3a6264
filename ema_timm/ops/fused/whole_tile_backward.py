"""Triton kernels of EMA attention: the backward of one tile by one program.

Letters and bundles are those of `ema_timm.ops.fused.bundles`, blocks and walks those of
`ema_timm.ops.fused.whole_tile`. dL is a kernel of its own, for tiles of any size: what shifts dL
reads it where other programs wrote it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.closed_form.saved import Saved
from ema_timm.ops.fused.blocks import (
    Slope,
    at_ends,
    centred,
    kernel_gradient,
    norm_gradient,
    pick,
    shifted_means,
    softmax_gradient,
    spread,
    spread_votes,
    sum_taps,
    without_ends,
)
from ema_timm.ops.fused.bundles import (
    Map,
    Size,
    aligned_size,
    kept_of,
    load_block,
    load_columns,
    load_matrix,
    load_plane,
    load_rows,
    load_vector,
    store_block,
    store_lines,
    store_plane,
    tile_of,
)
from ema_timm.ops.weights import FoldedWeights


@triton.jit
def gate_gradient(
    grad: Map,
    x: Map,
    gate_map,  # (B·G, H, W)
    dl,  # dL, (B·G, H, W): written
    size: Size,
    n: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """DL = (Σ_c D·x)·A·(1 − A), a block of pixels each. Grid (B·G, row blocks, column blocks)."""
    size = aligned_size(size, VECTOR, LAST)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    w = tl.program_id(2) * BW + tl.arange(0, BW)
    grad, x = tile_of(grad, size, n, VECTOR, LAST), tile_of(x, size, n, VECTOR, LAST)
    total = tl.zeros((BH, BW), tl.float32)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        total += tl.sum(load_block(grad, c, h, w) * load_block(x, c, h, w), axis=0)
    plane = tl.program_id(0).to(tl.int64) * size.H * size.W
    gate = load_plane(gate_map + plane, x, h, w)
    store_plane(dl + plane, x, total * gate * (1 - gate), h, w)


class Known(NamedTuple):
    """What the backward reads of `Kept` once a tile: gates along W, (BN, BW), the rest (BN,)."""

    gate_w: Any
    mean: Any
    rest: Any
    r: Any
    u: Any


class Shares(NamedTuple):
    """A tile's share of the parameters' gradients, in the order of ``parts``.

    Attributes:
        dk: (BN, 16), as are all below (BN,) but for the last two.
        dm: Of the votes' logits.
        dgamma: Of the norm's weight.
        dbeta: Of its bias, but for v.
        db1: Of the bias of the 1×1 convolution.
        dw1: Of its weight, (BN, BN).
        dl_sum: ΣdL, one number.
    """

    dk: Any
    dm: Any
    dgamma: Any
    dbeta: Any
    db1: Any
    dw1: Any
    dl_sum: Any


@triton.jit
def backward_tile(
    grad: Map,
    x: Map,
    dx: Map,
    saved: Saved,
    dl,  # dL, (B·G, H, W)
    weights: FoldedWeights,
    parts,  # (B·G, 13 n + n² + 1): dk (9, n), dm, dγ, dβ, db₁, dW₁ (n, n), ΣdL
    means,  # (B·G, n, 9): shifted means
    size: Size,
    n: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Everything behind dL for one tile: its dx and its share of the parameters' gradients.

    Grid (B·G,).
    """
    size = aligned_size(size, VECTOR, LAST)
    grad, x = tile_of(grad, size, n, VECTOR, LAST), tile_of(x, size, n, VECTOR, LAST)
    dx = tile_of(dx, size, n, VECTOR, LAST)
    kept = kept_of(saved, size, n)
    tile = tl.program_id(0).to(tl.int64)
    dl += tile * size.H * size.W
    c, w, t = tl.arange(0, BN), tl.arange(0, BW), tl.arange(0, 16)
    known = load_known(kept, x, c, w)

    col_sum, dk, y_dot, dl_sum = sum_tile(x, kept, known, dl, c, w, t, BH)
    gamma, beta = load_vector(weights.gn_weight, c, n), load_vector(weights.gn_bias, c, n)
    slope = Slope(
        known.u * gamma * known.r,
        known.r * y_dot / (size.H * size.W),
        dl_sum / (size.H * size.W),
    )
    dm = softmax_gradient(known.u, gamma * y_dot + beta * dl_sum)
    taps = spread_votes(dm, weights.vote_weight, x, c, t, n)

    # Gates along W.
    dq = column_gradient(x, kept, known, slope, dl, c, w, BH)
    w1 = load_matrix(weights.mix_weight, c, n, n, 1)
    db1 = tl.sum(dq, axis=1)
    dw1 = tl.sum(dq[:, None, :] * (col_sum / size.H)[None, :, :], axis=2)
    col_term = tl.sum(w1[:, :, None] * dq[:, None, :], axis=0) / size.H

    # What the taps leave out, and the corners that were left out twice.
    tap_y, tap_x = t // 3 - 1, t % 3 - 1
    lost_left, lost_right = sum_taps(taps, (tap_x > 0) & (t < 9)), sum_taps(taps, tap_x < 0)
    lost_top, lost_bottom = sum_taps(taps, tap_y == 1), sum_taps(taps, tap_y < 0)
    everywhere = tl.sum(taps, axis=1)
    col_term = without_ends(col_term, lost_left, lost_right, w, size.W)
    top = at_ends(pick(taps, t, 8), pick(taps, t, 6), w, size.W)
    bottom = at_ends(pick(taps, t, 2), pick(taps, t, 0), w, size.W)

    # Gates along H, and dx.
    for h0 in range(0, size.H, BH):
        h = h0 + tl.arange(0, BH)
        block, gate_h, y, seen = walk(x, kept, known, dl, c, h, w)
        dy = norm_gradient(y, seen, slope)
        dy = dy * known.gate_w[:, None, :]
        dp = tl.sum(dy * block, axis=2) * gate_h * (1 - gate_h)
        db1 += tl.sum(dp, axis=1)
        pooled = tl.sum(block, axis=2) / size.W
        dw1 += tl.sum(dp[:, None, :] * pooled[None, :, :], axis=2)
        row_term = tl.sum(w1[:, :, None] * dp[:, None, :], axis=0) / size.W + everywhere[:, None]
        row_term = without_ends(row_term, lost_top, lost_bottom, h, size.H)
        found = dy * gate_h[:, :, None] + row_term[:, :, None] + col_term[:, None, :]
        found += tl.where((h == 0)[None, :, None], top[:, None, :], 0.0)
        found += tl.where((h == size.H - 1)[None, :, None], bottom[:, None, :], 0.0)
        found += spread(dl, weights.kernel, x, c, h, w)
        gate = load_plane(kept.gate_map, x, h, w)
        found += load_block(grad, c, h, w) * gate[None, :, :]
        store_block(dx, found, c, h, w)

    shares = Shares(dk, dm, known.u * y_dot, known.u * dl_sum, db1, dw1, dl_sum)
    store_shares(parts + tile * (13 * n + n * n + 1), shares, c, t, n)
    store_lines(means + tile * n * 9, shifted_means(x, col_sum, c, w, t), c, t, n, 9, 9)


@triton.jit
def load_known(kept, x, c, w):
    """`Known` of one tile."""
    mean, rest = load_vector(kept.mean, c, x.n), load_vector(kept.rest, c, x.n)
    r, u = load_vector(kept.r, c, x.n), load_vector(kept.u, c, x.n)
    return Known(load_columns(kept.gates, x, c, w), mean, rest, r, u)


@triton.jit
def walk(x, kept, known, dl, c, h, w):
    """One step through a tile: a block, its gates along H, its y − μ and its rows of dL."""
    block = load_block(x, c, h, w)
    gate_h = load_rows(kept.gates, x, c, h)
    seen = load_plane(dl, x, h, w)
    return block, gate_h, centred(block, gate_h, known.gate_w, known.mean, known.rest), seen


@triton.jit
def sum_tile(x, kept, known, dl, c, w, t, BH: tl.constexpr):
    """What the statistics and the collapsed kernel need: sums along H, dk, Σ dL·ŷ and ΣdL."""
    col_sum = tl.zeros((c.shape[0], w.shape[0]), tl.float32)
    dk = tl.zeros((c.shape[0], 16), tl.float32)
    y_dot = tl.zeros((c.shape[0],), tl.float32)
    dl_sum = 0.0
    for h0 in range(0, x.H, BH):
        h = h0 + tl.arange(0, BH)
        block, _, y, seen = walk(x, kept, known, dl, c, h, w)
        y_dot += tl.sum(tl.sum(y * seen[None, :, :], axis=2), axis=1)
        dl_sum += tl.sum(tl.sum(seen, axis=1), axis=0)
        col_sum += tl.sum(block, axis=1)
        dk += kernel_gradient(dl, x, block, h, w, t)
    return col_sum, dk, y_dot * known.r, dl_sum


@triton.jit
def column_gradient(x, kept, known, slope, dl, c, w, BH: tl.constexpr):
    """Dq, the gradient before the gates along W, (BN, BW)."""
    dq = tl.zeros((c.shape[0], w.shape[0]), tl.float32)
    for h0 in range(0, x.H, BH):
        block, gate_h, y, seen = walk(x, kept, known, dl, c, h0 + tl.arange(0, BH), w)
        dy = norm_gradient(y, seen, slope)
        dq += tl.sum(dy * block * gate_h[:, :, None], axis=1)
    return dq * known.gate_w * (1 - known.gate_w)


@triton.jit
def store_shares(share, found, c, t, n: tl.constexpr):
    """Write the `Shares` of one tile at ``share``."""
    at = t[None, :] * n + c[:, None]
    tl.store(share + at, found.dk, mask=(c < n)[:, None] & (t < 9)[None, :])
    share += 9 * n
    tl.store(share + c, found.dm, mask=c < n)
    tl.store(share + n + c, found.dgamma, mask=c < n)
    tl.store(share + 2 * n + c, found.dbeta, mask=c < n)
    tl.store(share + 3 * n + c, found.db1, mask=c < n)
    store_lines(share + 4 * n, found.dw1, c, c, n, n, n)
    tl.store(share + 4 * n + n * n, found.dl_sum)
