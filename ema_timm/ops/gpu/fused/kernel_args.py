"""What the Triton kernels of EMA attention take, and how it is read and written.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample,
(n, H, W), and one program takes it from end to end. A block is (BN, BH, BW): channels, rows and
columns, each a power of two, at the positions c, h and w. A line is a row or a column, L = H + W
lines a tile: rows first.

Maps are contiguous or channels_last. What the forward keeps comes as
`ema_timm.ops.saved.Saved`, parameters as `ema_timm.ops.weights.FoldedWeights` and the
sizes as `Size`: named tuples, which Triton takes apart like single arguments. What must be known
when a kernel is compiled stays outside of the bundles, because Triton 3.3 finds no attributes in a
constant:

    n: Channels of a group.
    LAST: Maps are channels_last, and numbers of lines are (L, n) instead of (n, L).
    VECTOR, EVEN: What divides W and H; Triton finds out by itself only what 16 divides.
    BN, BH, BW: Shape of a block.

A size of 1 is a constant too, without the methods of a number: what has to be widened comes from
the grid.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Size(NamedTuple):
    """What the maps of one call have in common, beside n.

    Attributes:
        groups: G.
        H: Rows.
        W: Columns.
    """

    groups: Any
    H: Any
    W: Any


class Tile(NamedTuple):
    """One program's tile of a map, as `tile_of` finds it.

    Attributes:
        start: Its first number, a pointer.
        c: Step from channel to channel, in numbers, as are the others.
        h: From row to row.
        w: From column to column.
        H: Rows.
        W: Columns.
        lc: Among numbers of lines, the step from channel to channel.
        lp: From line to line.
    """

    start: Any
    c: Any
    h: Any
    w: Any
    H: Any
    W: Any
    lc: Any
    lp: Any


class Kept(NamedTuple):
    """Where one tile's part of `Saved` begins, as `kept_of` finds it.

    Attributes:
        gates: Gates of rows and columns, n for each of L lines.
        gate_map: A, (H, W).
        mean: Mean of y, (n,).
        rest: What the rounding of the mean leaves, (n,).
        r: 1/std of y, (n,).
        u: Votes, (n,).
    """

    gates: Any
    gate_map: Any
    mean: Any
    rest: Any
    r: Any
    u: Any


@triton.jit
def tile_of(
    start, size, n: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr, LAST: tl.constexpr
):
    """This program's tile of the map at ``start``."""
    tile = tl.program_id(0).to(tl.int64)
    H, W = size.H, size.W
    if LAST:
        C = size.groups * n
        start += (tile // size.groups) * (H * W * C) + (tile % size.groups) * n
        return Tile(start, 1, W * C, C, H, W, 1, n)
    else:
        H, W = H // EVEN * EVEN, W // VECTOR * VECTOR
        return Tile(start + tile * (H * W * n), H * W, W, 1, H, W, H + W, 1)


@triton.jit
def kept_of(saved, x, n: tl.constexpr):
    """This program's part of ``saved``, for its tile ``x``."""
    tile = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * n
    mean = saved.vectors + tile * n
    return Kept(
        saved.gates + tile * n * (x.H + x.W),
        saved.gate_map + tile * x.H * x.W,
        mean,
        mean + step,
        mean + 2 * step,
        mean + 3 * step,
    )


@triton.jit
def places(x, c, h, w):
    """Offsets of a block, (BN, BH, BW); steps of rows are added to the pointer beside them."""
    return (c * x.c)[:, None, None] + ((h * x.h)[:, None] + (w * x.w)[None, :])[None, :, :]


@triton.jit
def inside(x, c, h, w, n: tl.constexpr):
    """Which positions of a block lie in the tile ``x``; h is not negative."""
    mask = (h < x.H)[None, :, None] & (w < x.W)[None, None, :]
    if n // c.shape[0] * c.shape[0] != n:
        mask = mask & (c < n)[:, None, None]
    return mask


@triton.jit
def widened(numbers):
    """Half precision as float32; by a shift, which takes a bfloat16 in one instruction."""
    if numbers.dtype == tl.bfloat16:
        bits = numbers.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return numbers.to(tl.float32)


@triton.jit
def load_lines(numbers, x, c, first, p, P, n: tl.constexpr):
    """Of numbers of lines those of the lines ``first`` + p, zero from P on: (BN, BP)."""
    at = (c * x.lc)[:, None] + (p * x.lp)[None, :]
    mask = (c < n)[:, None] & (p < P)[None, :]
    return tl.load(numbers + first * x.lp + at, mask=mask, other=0.0)


@triton.jit
def store_lines(numbers, lines, x, c, first, p, P, n: tl.constexpr):
    """Write what `load_lines` reads."""
    at = (c * x.lc)[:, None] + (p * x.lp)[None, :]
    tl.store(numbers + first * x.lp + at, lines, mask=(c < n)[:, None] & (p < P)[None, :])


@triton.jit
def load_rows(numbers, x, c, h, n: tl.constexpr):
    """Numbers of rows, (BN, BH)."""
    return load_lines(numbers, x, c, 0, h, x.H, n)


@triton.jit
def load_columns(numbers, x, c, w, n: tl.constexpr):
    """Numbers of columns, (BN, BW)."""
    return load_lines(numbers, x, c, x.H, w, x.W, n)


@triton.jit
def load_vector(pointer, c, n: tl.constexpr):
    """One number a channel, zero beyond n: (BN,)."""
    return tl.load(pointer + c, mask=c < n, other=0.0)


@triton.jit
def load_beside(pointers, row: tl.constexpr, c, n: tl.constexpr):
    """Of a table with n columns one row, where ``pointers`` are those to the first: (BN,)."""
    return tl.load(pointers + row * n, mask=c < n, other=0.0)


@triton.jit
def store_vector(pointer, numbers, c, n: tl.constexpr):
    """Write one number a channel."""
    tl.store(pointer + c, numbers, mask=c < n)
