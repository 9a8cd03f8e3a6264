"""Arguments of the Triton kernels of EMA attention, and how kernels read and write them.

B batch, C channels, G groups, n = C / G, H height, W width. A tile is one group of one sample,
(n, H, W), and one program computes it. A block is (BN, BH, BW): channels, rows and columns, each a
power of two, at the positions c, h and w. A line is a row or a column; a tile has L = H + W lines,
rows first.

Maps are contiguous or channels_last. Several arguments are named tuples, which Triton treats like
single arguments: saved tensors are an `ema_timm.ops.saved.Saved`, parameters an
`ema_timm.ops.weights.FoldedWeights`, sizes a `Size`. Constants of compilation are separate
arguments, because Triton 3.3 finds no attributes in a constant tuple:

    n: Channels of a group.
    LAST: Maps are channels_last, and values of lines are (L, n) instead of (n, L).
    VECTOR, EVEN: Divisors of W and H; Triton itself finds out only whether 16 divides them.
    BN, BH, BW: Shape of a block.

A size of 1 is a constant too, without the methods of a number, so values that must be 64 bits wide
are computed from the grid.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Size(NamedTuple):
    """The sizes of one call, without n.

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
        start: Pointer to its first element.
        c: Step from channel to channel, in elements, as are the others.
        h: From row to row.
        w: From column to column.
        H: Rows.
        W: Columns.
        lc: In values of lines, the step from channel to channel.
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


class SavedTile(NamedTuple):
    """Pointers to one tile's part of `Saved`, as `saved_of` finds it.

    Attributes:
        gates: Gates of rows and columns, n for each of L lines.
        gate_map: A, (H, W).
        mean: Mean of y, (n,).
        rest: The part of the mean that rounding left out, (n,).
        r: 1/std of y, (n,).
        u: Cross-spatial weights, (n,).
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
def saved_of(saved, x, n: tl.constexpr):
    """This program's part of ``saved``, for its tile ``x``."""
    tile = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * n
    mean = saved.vectors + tile * n
    return SavedTile(
        saved.gates + tile * n * (x.H + x.W),
        saved.gate_map + tile * x.H * x.W,
        mean,
        mean + step,
        mean + 2 * step,
        mean + 3 * step,
    )


@triton.jit
def places(x, c, h, w):
    """Offsets of a block, (BN, BH, BW), from its first row, which the pointer is moved to."""
    return (c * x.c)[:, None, None] + ((h * x.h)[:, None] + (w * x.w)[None, :])[None, :, :]


@triton.jit
def inside(x, c, h, w, n: tl.constexpr):
    """Mask of the positions of a block that are inside the tile ``x``; h is not negative."""
    mask = (h < x.H)[None, :, None] & (w < x.W)[None, None, :]
    if n // c.shape[0] * c.shape[0] != n:
        mask = mask & (c < n)[:, None, None]
    return mask


@triton.jit
def widened(numbers):
    """Half precision as float32; bfloat16 by a shift, which is one instruction."""
    if numbers.dtype == tl.bfloat16:
        bits = numbers.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return numbers.to(tl.float32)


@triton.jit
def load_lines(numbers, x, c, first, p, P, n: tl.constexpr):
    """Values of the lines ``first`` + p, zero from P on: (BN, BP)."""
    at = (c * x.lc)[:, None] + (p * x.lp)[None, :]
    mask = (c < n)[:, None] & (p < P)[None, :]
    return tl.load(numbers + first * x.lp + at, mask=mask, other=0.0)


@triton.jit
def store_lines(numbers, lines, x, c, first, p, P, n: tl.constexpr):
    """Write the values that `load_lines` reads."""
    at = (c * x.lc)[:, None] + (p * x.lp)[None, :]
    tl.store(numbers + first * x.lp + at, lines, mask=(c < n)[:, None] & (p < P)[None, :])


@triton.jit
def load_rows(numbers, x, c, h, n: tl.constexpr):
    """Values of rows, (BN, BH)."""
    return load_lines(numbers, x, c, 0, h, x.H, n)


@triton.jit
def load_columns(numbers, x, c, w, n: tl.constexpr):
    """Values of columns, (BN, BW)."""
    return load_lines(numbers, x, c, x.H, w, x.W, n)


@triton.jit
def load_vector(pointer, c, n: tl.constexpr):
    """One value a channel, zero beyond n: (BN,)."""
    return tl.load(pointer + c, mask=c < n, other=0.0)


@triton.jit
def load_row_of(pointers, row: tl.constexpr, c, n: tl.constexpr):
    """One row of a table with n columns; ``pointers`` are those to the first row: (BN,)."""
    return tl.load(pointers + row * n, mask=c < n, other=0.0)


@triton.jit
def store_vector(pointer, numbers, c, n: tl.constexpr):
    """Write one value a channel."""
    tl.store(pointer + c, numbers, mask=c < n)
