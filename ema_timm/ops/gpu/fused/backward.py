"""Triton kernel of EMA attention: the backward of one tile by one program.

Letters and arguments are those of `ema_timm.ops.gpu.fused.kernel_args`, passes those of
`ema_timm.ops.gpu.fused.forward`. `ema_timm.ops.gpu.fused.backward_sums` has the first passes,
`ema_timm.ops.gpu.fused.backward_lines` the next ones.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.gpu.fused.backward_lines import (
    line_gradients,
    mix_gradient,
    norm_gradient,
    slope_of,
)
from ema_timm.ops.gpu.fused.backward_sums import (
    finish_vectors,
    gate_gradient,
    kernel_gradient,
    pixels_at,
)
from ema_timm.ops.gpu.fused.kernel_args import (
    Size,
    inside,
    load_columns,
    load_row_of,
    load_rows,
    places,
    saved_of,
    tile_of,
    widened,
)
from ema_timm.ops.gpu.fused.steps import store_means
from ema_timm.ops.saved import Saved
from ema_timm.ops.weights import FoldedWeights


class Scratch(NamedTuple):
    """Intermediate results of a tile, and its share of the parameters' gradients.

    Attributes:
        dl: dL with a border of zeros, (B·G, H + 2, W + 2).
        sums: Sums of lines, (B·G, n, L).
        mixed: Gradients before the gates of lines, (B·G, n, L).
        terms: The gradient that reaches x through its lines, (B·G, n, L).
        totals: Sums of channels, (B·G, n).
        dots: Σ dL·ŷ, (B·G, n).
        slopes: The fields of `Slope`, (B·G, 4, n).
        taps: The gradient that reaches x through each tap, (B·G, 9n).
        means: Shifted means, (B·G, 9n).
        parts: (B·G, 14n + n²): dk (n, 9), dm, dγ, dβ, db₃, db₁, dW₁ (n, n).
    """

    dl: Any
    sums: Any
    mixed: Any
    terms: Any
    totals: Any
    dots: Any
    slopes: Any
    taps: Any
    means: Any
    parts: Any


@triton.jit
def scratch_of(scratch, x, n: tl.constexpr):
    """This program's part of ``scratch``."""
    tile = tl.program_id(0).to(tl.int64)
    L = x.H + x.W
    return Scratch(
        scratch.dl + tile * (x.H + 2) * (x.W + 2),
        scratch.sums + tile * n * L,
        scratch.mixed + tile * n * L,
        scratch.terms + tile * n * L,
        scratch.totals + tile * n,
        scratch.dots + tile * n,
        scratch.slopes + tile * 4 * n,
        scratch.taps + tile * 9 * n,
        scratch.means + tile * 9 * n,
        scratch.parts + tile * (14 * n + n * n),
    )


@triton.jit
def backward_tile(
    grad,
    x,
    dx,
    saved: Saved,
    scratch: Scratch,
    weights: FoldedWeights,
    v,  # softmax of β
    size: Size,
    n: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    NARROW: tl.constexpr,
    PRODUCT: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
    BA: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BX: tl.constexpr,
    BL: tl.constexpr,
    PN: tl.constexpr,
):
    """The backward of one tile: its dx and its share of the parameters' gradients.

    Grid (B·G,). Constants are those of `ema_timm.ops.gpu.fused.forward.forward_tile`.
    """
    # Few columns a thread, so that a thread holds several channels.
    narrow = tile_of(x, size, n, NARROW, EVEN, LAST)
    grad, x = tile_of(grad, size, n, VECTOR, EVEN, LAST), tile_of(x, size, n, VECTOR, EVEN, LAST)
    dx = tile_of(dx, size, n, VECTOR, EVEN, LAST)
    saved, own = saved_of(saved, x, n), scratch_of(scratch, x, n)
    dl_sum = gate_gradient(grad, x, saved, own.dl, n, BC, BR, BW)
    tl.debug_barrier()
    kernel_gradient(narrow, saved, own, dl_sum, n, PRODUCT, BD, BE, BW)
    tl.debug_barrier()
    finish_vectors(x, saved, own, weights, v, dl_sum, n, PN)
    tl.debug_barrier()
    line_gradients(x, saved, own, n, LAST, BN, BH, BW, BA, BP, BQ)
    tl.debug_barrier()
    store_means(x, own.sums, own.totals, own.means, n)
    mix_gradient(x, own, weights, n, BX, BL, PN)
    tl.debug_barrier()
    input_gradient(grad, x, dx, saved, own, weights.kernel, n, BC, BR, BW, PN)


@triton.jit
def input_gradient(
    grad,
    x,
    dx,
    saved,
    own,
    kernel,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    PN: tl.constexpr,
):
    """Write dx. Corners lost two borders, so they are corrected and written again."""
    for h0 in range(0, x.H, BH):
        pixel_gradients(
            grad, x, dx, saved, own, kernel, h0, tl.arange(0, BH), tl.arange(0, BW), n, BN, False
        )
    tl.debug_barrier()
    ends = tl.arange(0, 2)
    h, w = ends * (x.H - 1), ends * (x.W - 1)
    pixel_gradients(grad, x, dx, saved, own, kernel, 0, h, w, n, PN, True)


@triton.jit
def pixel_gradients(
    grad,
    x,
    dx,
    saved,
    own,
    kernel,
    h0,
    rows,
    w,
    n: tl.constexpr,
    BN: tl.constexpr,
    CORNERS: tl.constexpr,
):
    """Write dx of the rows h0 + ``rows`` and the columns w.

    The nine shifts of dL are loaded once for all channels.
    """
    h = h0 + rows
    pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
    gate = tl.load(saved.gate_map + h[:, None] * x.W + w[None, :], mask=pixels, other=0.0)
    dl = own.dl + pixels_at(x, h, w)
    above, below = dl - (x.W + 2), dl + (x.W + 2)
    seen = (
        tl.load(below + 1),
        tl.load(below),
        tl.load(below - 1),
        tl.load(dl + 1),
        tl.load(dl),
        tl.load(dl - 1),
        tl.load(above + 1),
        tl.load(above),
        tl.load(above - 1),
    )
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
        of = slope_of(own, c, n)
        block = widened(tl.load(x.start + at, mask=mask, other=0.0))
        gate_h, gate_w = load_rows(saved.gates, x, c, h, n), load_columns(saved.gates, x, c, w, n)
        both = gate_h[:, :, None] * gate_w[:, None, :]
        found = load_rows(own.terms, x, c, h, n)[:, :, None]
        found += load_columns(own.terms, x, c, w, n)[:, None, :]
        found += norm_gradient(block * both, seen[4], of) * both
        for tap in tl.static_range(9):
            taps = load_row_of(kernel + c, tap, c, n)
            found += taps[:, None, None] * seen[tap][None, :, :]
        incoming = widened(tl.load(grad.start + at, mask=mask, other=0.0))
        found += incoming * gate[None, :, :]
        if CORNERS:
            found = add_corners(found, own.taps, x, c, h, w, n)
        tl.store(dx.start + at, found.to(dx.start.dtype.element_ty), mask=mask)


@triton.jit
def add_corners(found, taps, x, c, h, w, n: tl.constexpr):
    """``found`` with the part of the corners added that was subtracted twice.

    Tap 0 loses the last row and the last column, tap 2 the last row and the first column, ...
    """
    for corner in tl.static_range(4):
        at_row = h == (x.H - 1 if corner < 2 else 0)
        at_column = w == (x.W - 1 if corner % 2 == 0 else 0)
        here = at_row[None, :, None] & at_column[None, None, :]
        value = tl.load(taps + c * 9 + (corner // 2) * 6 + (corner % 2) * 2, mask=c < n, other=0.0)
        found += tl.where(here, value[:, None, None], 0.0)
    return found
