"""What the Triton kernels of EMA attention take, and how it is read and written.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample,
(n, H, W), and the first axis of every grid counts tiles. A block is (BN, BH, BW): channels, rows
and columns, each a power of two, at the positions c, h and w.

A kernel takes feature maps as `Map`, what the forward keeps as
`ema_timm.ops.closed_form.saved.Saved`, parameters as `ema_timm.ops.weights.FoldedWeights` and the
sizes as `Size`: named tuples, which Triton takes apart like single arguments. Maps come with any
strides; everything else is contiguous float32. What must be known when a kernel is compiled stays
outside of the bundles, because Triton 3.3 finds no attributes in a constant:

    n: Channels of a group.
    BN, BH, BW: Shape of a block.
    VECTOR: What divides every stride but one, which is 1.
    LAST: The stride that is 1 is that of the channels, not that of the columns.

A size or stride of 1 is a constant too, without the methods of a number: what has to be widened
comes from the grid.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Map(NamedTuple):
    """A feature map, (B, C, H, W).

    Attributes:
        start: Where it begins: the tensor, in the kernel a pointer.
        b: Stride of the samples, in numbers, as are the others.
        c: Stride of the channels.
        h: Stride of the rows.
        w: Stride of the columns.
    """

    start: Any
    b: Any
    c: Any
    h: Any
    w: Any

    @classmethod
    def of(cls, x: Tensor) -> "Map":
        """The bundle of one tensor."""
        return cls(x, *x.stride())


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
    """One program's tile of a `Map`, (n, H, W), as `tile_of` finds it."""

    start: Any
    c: Any
    h: Any
    w: Any
    n: Any
    H: Any
    W: Any


class Kept(NamedTuple):
    """Where one tile's part of `Saved` begins, as `kept_of` finds it.

    Attributes:
        gates: Gates along H and W, (n, H + W).
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
def aligned(number, VECTOR: tl.constexpr):
    """``number``, which is a multiple of VECTOR, in a form from which the compiler sees it."""
    return number // VECTOR * VECTOR


@triton.jit
def aligned_size(size, VECTOR: tl.constexpr, LAST: tl.constexpr):
    """``size``, with what `aligned` can say of its width."""
    W = size.W
    if not LAST:
        W = aligned(W, VECTOR)
    return Size(size.groups, size.H, W)


@triton.jit
def tile_of(m, size, n: tl.constexpr, VECTOR: tl.constexpr = 1, LAST: tl.constexpr = False):
    """This program's tile of the map ``m``, with what `aligned` can say of its strides."""
    b, c, h, w = aligned(m.b, VECTOR), m.c, aligned(m.h, VECTOR), m.w
    if LAST:
        w = aligned(w, VECTOR)
    else:
        c = aligned(c, VECTOR)
    tile = tl.program_id(0).to(tl.int64)
    start = m.start + (tile // size.groups) * b + (tile % size.groups) * n * c
    return Tile(start, c, h, w, n, size.H, size.W)


@triton.jit
def kept_of(saved, size, n: tl.constexpr):
    """This program's part of ``saved``."""
    tile = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * n
    mean = saved.vectors + tile * n
    return Kept(
        saved.gates + tile * n * (size.H + size.W),
        saved.gate_map + tile * size.H * size.W,
        mean,
        mean + step,
        mean + 2 * step,
        mean + 3 * step,
    )


@triton.jit
def inside(x, c, h, w):
    """Which positions of a block lie in the tile ``x``."""
    rows = (h >= 0) & (h < x.H)
    cols = (w >= 0) & (w < x.W)
    return (c < x.n)[:, None, None] & rows[None, :, None] & cols[None, None, :]


@triton.jit
def places(x, c, h, w):
    """Offsets of a block; 64 bits, because a stride can be anything."""
    c, h, w = c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (c * x.c)[:, None, None] + (h * x.h)[None, :, None] + (w * x.w)


@triton.jit
def load_block(x, c, h, w):
    """A block of the tile ``x`` in float32, zero outside: (BN, BH, BW)."""
    at = places(x, c, h, w)
    return tl.load(x.start + at, mask=inside(x, c, h, w), other=0.0).to(tl.float32)


@triton.jit
def store_block(x, block, c, h, w):
    """Write what of a block lies in the tile ``x``, in the map's own type."""
    at = places(x, c, h, w)
    tl.store(x.start + at, block.to(x.start.dtype.element_ty), mask=inside(x, c, h, w))


@triton.jit
def load_plane(plane, x, h, w):
    """Rows of a map (H, W) as large as the tile ``x``, zero outside: (BH, BW)."""
    at = h[:, None] * x.W + w[None, :]
    rows = ((h >= 0) & (h < x.H))[:, None]
    return tl.load(plane + at, mask=rows & ((w >= 0) & (w < x.W))[None, :], other=0.0)


@triton.jit
def store_plane(plane, x, rows, h, w):
    """Write rows of a map (H, W)."""
    at = h[:, None] * x.W + w[None, :]
    tl.store(plane + at, rows, mask=(h < x.H)[:, None] & (w < x.W)[None, :])


@triton.jit
def load_lines(pointer, c, p, n, P, stride):
    """Numbers at P positions of each channel, zero outside: (BN, BP)."""
    at = c.to(tl.int64)[:, None] * stride + p[None, :]
    return tl.load(pointer + at, mask=(c < n)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def store_lines(pointer, lines, c, p, n, P, stride):
    """Write what `load_lines` reads."""
    at = c.to(tl.int64)[:, None] * stride + p[None, :]
    tl.store(pointer + at, lines, mask=(c < n)[:, None] & (p < P)[None, :])


@triton.jit
def load_rows(lines, x, c, h):
    """Of numbers along H and W, (n, H + W), those along H: (BN, BH)."""
    return load_lines(lines, c, h, x.n, x.H, x.H + x.W)


@triton.jit
def load_columns(lines, x, c, w):
    """Of numbers along H and W, (n, H + W), those along W: (BN, BW)."""
    return load_lines(lines + x.H, c, w, x.n, x.W, x.H + x.W)


@triton.jit
def load_vector(pointer, c, n):
    """One number a channel, zero beyond n: (BN,)."""
    return tl.load(pointer + c, mask=c < n, other=0.0)


@triton.jit
def load_matrix(pointer, c, n, stride_o, stride_i):
    """A matrix over output and input channels, zero beyond n: (BN, BN)."""
    at = c[:, None] * stride_o + c[None, :] * stride_i
    return tl.load(pointer + at, mask=(c < n)[:, None] & (c < n)[None, :], other=0.0)
