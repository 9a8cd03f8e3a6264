"""Steps of the derivation that the forward and the backward of a tile share.

Letters, arguments and loads are those of `ema_timm.ops.gpu.fused.kernel_args`, identities a to d
those of `ema_timm.ops.formula`. Tap (dy, dx) has index t = 3·(dy + 1) + dx + 1; channel i and tap t
together have index k = 9·i + t.
"""

import triton
import triton.language as tl

from ema_timm.ops.gpu.fused.kernel_args import inside, places, store_lines, store_vector, widened


@triton.jit
def pool(
    x,
    sums,
    totals,
    n: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BA: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
):
    """Write the sum of every line and of every channel.

    In contiguous maps a thread holds neighbours in a row and adds most of them by itself, so that
    one pass makes the sums of rows and columns. In channels_last a thread holds channels, and rows
    and columns each take a pass along the lines.
    """
    if LAST:
        for c0 in range(0, n, BA):
            c = c0 + tl.arange(0, BA)
            for p0 in range(0, x.W, BP):
                p = p0 + tl.arange(0, BP)
                found = sum_lines(x, c, p, x.w, x.W, x.h, x.H, n, BQ)
                store_lines(sums, found, x, c, x.H, p, x.W, n)
            total = tl.zeros((BA,), tl.float32)
            for p0 in range(0, x.H, BP):
                p = p0 + tl.arange(0, BP)
                found = sum_lines(x, c, p, x.h, x.H, x.w, x.W, n, BQ)
                store_lines(sums, found, x, c, 0, p, x.H, n)
                total += tl.sum(found, axis=1)
            store_vector(totals, total, c, n)
    else:
        w, rows = tl.arange(0, BW), tl.arange(0, BH)
        for c0 in range(0, n, BN):
            c = c0 + tl.arange(0, BN)
            columns = tl.zeros((BN, BH, BW), tl.float32)
            for h0 in range(0, x.H, BH):
                h = h0 + rows
                at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
                block = widened(tl.load(x.start + at, mask=mask, other=0.0))
                columns += block
                store_lines(sums, tl.sum(block, axis=2), x, c, 0, h, x.H, n)
            found = tl.sum(columns, axis=1)
            store_lines(sums, found, x, c, x.H, w, x.W, n)
            store_vector(totals, tl.sum(found, axis=1), c, n)


@triton.jit
def sum_lines(x, c, p, step_p, P, step_q, Q, n: tl.constexpr, BQ: tl.constexpr):
    """Sums of the lines at p, along Q positions, (BN, BP).

    Threads are laid out along p, or along neighbours in memory, so that little is left to add
    between threads.
    """
    total = tl.zeros((c.shape[0], BQ, p.shape[0]), tl.float32)
    q = tl.arange(0, BQ)
    at = (c * x.c)[:, None, None] + ((q * step_q)[:, None] + (p * step_p)[None, :])[None, :, :]
    known = (p < P)[None, None, :]
    if n // c.shape[0] * c.shape[0] != n:
        known = known & (c < n)[:, None, None]
    for q0 in range(0, Q, BQ):
        mask = (q < Q - q0)[None, :, None] & known
        total += widened(tl.load(x.start + q0 * step_q + at, mask=mask, other=0.0))
    return tl.sum(total, axis=1)


@triton.jit
def centred(x, block, gate_h, gate_w, mean_w, h, h0):
    """Y less its mean, (BN, BH, BW), from gates (BN, BH) and (BN, BW); zero outside of the map.

    Args:
        x: The tile.
        block: Of it.
        gate_h: Gates of the rows h.
        gate_w: Gates of the columns.
        mean_w: The mean, and zero after the last column: `mean_of_columns`.
        h: Rows.
        h0: The first of them.
    """
    y = block * gate_h[:, :, None] * gate_w[:, None, :] - mean_w[:, None, :]
    if h0 + h.shape[0] > x.H:
        y = tl.where((h < x.H)[None, :, None], y, 0.0)
    return y


@triton.jit
def mean_of_columns(x, mean, w):
    """``mean``, (BN,), where there are columns, (BN, BW)."""
    return tl.where((w < x.W)[None, :], mean[:, None], 0.0)


@triton.jit
def sum_pixels(block):
    """Sums over rows and columns, (BN,): in a thread first, then between threads once."""
    return tl.sum(tl.reshape(block, (block.shape[0], block.shape[1] * block.shape[2])), axis=1)


@triton.jit
def shifted_means(x, sums, totals, k, n: tl.constexpr):
    """Identity c: what each tap of a zero-padded 3×3 kernel sees in the mean, at k."""
    i, t = k // 9, k % 9
    known, dy, dx = k < 9 * n, t // 3 - 1, t % 3 - 1
    row, column = tl.where(dy < 0, x.H - 1, 0), tl.where(dx < 0, x.W - 1, 0)
    line = sums + i * x.lc
    found = tl.load(totals + i, mask=known, other=0.0)
    found -= tl.load(line + row * x.lp, mask=known & (dy != 0), other=0.0)
    found -= tl.load(line + (x.H + column) * x.lp, mask=known & (dx != 0), other=0.0)
    corner = x.start + i * x.c + row * x.h + column * x.w
    found += widened(tl.load(corner, mask=known & (dy != 0) & (dx != 0), other=0.0))
    return found / (x.H * x.W)


@triton.jit
def store_means(x, sums, totals, means, n: tl.constexpr):
    """Write `shifted_means` of all channels and taps."""
    for k0 in range(0, 9 * n, 128):
        k = k0 + tl.arange(0, 128)
        tl.store(means + k, shifted_means(x, sums, totals, k, n), mask=k < 9 * n)


@triton.jit
def shift_columns(plane, w, BY: tl.constexpr, BW: tl.constexpr):
    """``plane`` (BH, BW) read at column w + BY, zero outside the block; BY is -1 or 1."""
    source = w + BY
    at = tl.minimum(tl.maximum(source, 0), BW - 1)
    moved = tl.gather(plane, tl.broadcast_to(at[None, :], plane.shape), axis=1)
    return tl.where(((source >= 0) & (source < BW))[None, :], moved, 0.0)
