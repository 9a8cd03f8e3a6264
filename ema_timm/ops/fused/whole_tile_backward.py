"""Triton kernel of EMA attention: the backward of one tile by one program.

Letters and bundles are those of `ema_timm.ops.fused.bundles`, walks those of
`ema_timm.ops.fused.whole_tile`. dL, which has no channels, lies in scratch with a border of zeros,
so that its neighbours are read without asking where the map ends.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.closed_form.saved import Saved
from ema_timm.ops.fused.blocks import pool, shifted_means
from ema_timm.ops.fused.bundles import (
    Size,
    inside,
    kept_of,
    load_columns,
    load_lines,
    load_rows,
    load_vector,
    places,
    store_lines,
    store_vector,
    tile_of,
)
from ema_timm.ops.weights import FoldedWeights


class Scratch(NamedTuple):
    """What the walks of a tile tell each other, and a tile's share of the parameters' gradients.

    Attributes:
        dl: dL with a border of zeros, (B·G, H + 2, W + 2).
        sums: Sums of lines, (B·G, n, L).
        mixed: Gradients before the gates of lines, (B·G, n, L).
        terms: What reaches x through its lines, (B·G, n, L).
        dots: Sums of channels, then Σ dL·ŷ, (B·G, n).
        slopes: What `Slope` holds, (B·G, 3, n).
        taps: What reaches x through each tap, (B·G, 9n).
        means: Shifted means, (B·G, 9n).
        parts: (B·G, 13n + n² + 1): dk (9, n), dm, dγ, dβ, db₁, dW₁ (n, n), ΣdL.
    """

    dl: Any
    sums: Any
    mixed: Any
    terms: Any
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
        scratch.dots + tile * n,
        scratch.slopes + tile * 3 * n,
        scratch.taps + tile * 9 * n,
        scratch.means + tile * 9 * n,
        scratch.parts + tile * (13 * n + n * n + 1),
    )


@triton.jit
def backward_tile(
    grad,
    x,
    dx,
    saved: Saved,
    scratch: Scratch,
    weights: FoldedWeights,
    size: Size,
    n: tl.constexpr,
    VECTOR: tl.constexpr,
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
    """Everything behind the output for one tile: its dx and its share of the parameters' gradients.

    Grid (B·G,). Constants are those of `ema_timm.ops.fused.whole_tile.forward_tile`.
    """
    narrow = tile_of(x, size, n, NARROW, LAST)  # few columns a thread, so that channels lie in it
    grad, x = tile_of(grad, size, n, VECTOR, LAST), tile_of(x, size, n, VECTOR, LAST)
    dx = tile_of(dx, size, n, VECTOR, LAST)
    kept, own = kept_of(saved, size, n), scratch_of(scratch, x, n)
    dl_sum = gate_gradient(grad, x, kept, own.dl, n, BC, BR, BW)
    tl.store(own.parts + 13 * n + n * n, dl_sum)
    pool(x, own.sums, own.dots, n, BA, BP, BQ)
    tl.debug_barrier()
    for k0 in range(0, 9 * n, 32):
        k = k0 + tl.arange(0, 32)
        tl.store(own.means + k, shifted_means(x, own.sums, own.dots, k, n), mask=k < 9 * n)
    tl.debug_barrier()
    kernel_gradient(narrow, kept, own, dl_sum, n, PRODUCT, BD, BE, BW)
    tl.debug_barrier()
    finish_vectors(x, kept, own, weights, dl_sum, n, PN)
    tl.debug_barrier()
    line_gradients(x, kept, own, n, BN, BH, BW)
    tl.debug_barrier()
    mix_gradient(x, own, weights, n, BX, BL, PN)
    tl.debug_barrier()
    input_gradient(grad, x, dx, kept, own, weights.kernel, n, BC, BR, BW)


@triton.jit
def gate_gradient(
    grad, x, kept, dl, n: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):
    """Write dL = (Σ_c D·x)·A·(1 − A); returns its sum."""
    w, rows = tl.arange(0, BW), tl.arange(0, BR)
    wide = x.W + 2
    total = tl.zeros((BR, BW), tl.float32)
    for h0 in range(0, x.H, BR):
        h = h0 + rows
        products = tl.zeros((BC, BR, BW), tl.float32)
        for c0 in range(0, n, BC):
            c = c0 + tl.arange(0, BC)
            at, mask = places(x, c, rows, w), inside(x, c, h, w, n)
            block = tl.load(x.start + h0 * x.h + at, mask=mask, other=0.0).to(tl.float32)
            seen = tl.load(grad.start + h0 * x.h + at, mask=mask, other=0.0).to(tl.float32)
            products += block * seen
        pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
        gate = tl.load(kept.gate_map + h[:, None] * x.W + w[None, :], mask=pixels, other=0.0)
        found = tl.sum(products, axis=0) * gate * (1 - gate)
        tl.store(dl + (h + 1)[:, None] * wide + (w + 1)[None, :], found, mask=pixels)
        tl.store(dl + (h + 1) * wide, 0.0, mask=h < x.H)
        tl.store(dl + (h + 2) * wide - 1, 0.0, mask=h < x.H)
        total += found
    for p0 in range(0, wide, BW):
        tl.store(dl + p0 + w, 0.0, mask=p0 + w < wide)
        tl.store(dl + (x.H + 1) * wide + p0 + w, 0.0, mask=p0 + w < wide)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def pixels_at(x, h, w):
    """Where dL of a block of pixels lies; positions outside of the map see its first pixel."""
    pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
    wide = x.W + 2
    return tl.where(pixels, (h + 1)[:, None] * wide + (w + 1)[None, :], wide + 1)


@triton.jit
def kernel_gradient(
    x,
    kept,
    own,
    dl_sum,
    n: tl.constexpr,
    PRODUCT: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Write dk, and Σ dL·ŷ."""
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        if PRODUCT:
            multiply_taps(x, own, c, n, BH, BW)
        else:
            for dy in tl.static_range(-1, 2):
                sum_taps(x, own, c, dy, n, BH, BW)
        w, rows = tl.arange(0, BW), tl.arange(0, BH)
        gate_w, mean = load_columns(kept.gates, x, c, w, n), load_vector(kept.mean, c, n)
        y_dot = tl.zeros((BN, BH, BW), tl.float32)
        for h0 in range(0, x.H, BH):
            h = h0 + rows
            at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
            block = tl.load(x.start + at, mask=mask, other=0.0).to(tl.float32)
            y = block * load_rows(kept.gates, x, c, h, n)[:, :, None] * gate_w[:, None, :]
            pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
            dl = tl.load(own.dl + pixels_at(x, h, w), mask=pixels, other=0.0)
            y_dot += (y - mean[:, None, None]) * dl[None, :, :]
        dot = tl.sum(tl.sum(y_dot, axis=2), axis=1) - load_vector(kept.rest, c, n) * dl_sum
        store_vector(own.dots, dot * load_vector(kept.r, c, n), c, n)


@triton.jit
def multiply_taps(x, own, c, n: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Write dk of the channels c: what each tap sees of dL times what there is of x."""
    w, rows, t = tl.arange(0, BW), tl.arange(0, BH), tl.arange(0, 16)
    shift = tl.where(t < 9, (t // 3 - 1) * (x.W + 2) + (t % 3 - 1), 0)
    dk = tl.zeros((16, c.shape[0]), tl.float32)
    for h0 in range(0, x.H, BH):
        h = h0 + rows
        at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
        block = tl.load(x.start + at, mask=mask, other=0.0)
        block = tl.trans(tl.reshape(block, (c.shape[0], BH * BW)))
        pixels = tl.reshape(pixels_at(x, h, w), (BH * BW,))
        seen = tl.load(own.dl + (pixels[None, :] - shift[:, None]))
        if block.dtype == tl.float32:
            dk = tl.dot(seen, block, dk, input_precision="tf32x3")
        else:  # half precision is exact in TF32, and dL is in two parts
            high = seen.to(tl.bfloat16).to(tl.float32)
            dk = tl.dot(high, block.to(tl.float32), dk, input_precision="tf32")
            dk = tl.dot(seen - high, block.to(tl.float32), dk, input_precision="tf32")
    at = t[:, None] * n + c[None, :]
    tl.store(own.parts + at, dk, mask=(t < 9)[:, None] & (c < n)[None, :])


@triton.jit
def sum_taps(x, own, c, dy: tl.constexpr, n: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Write dk of the channels c in one row of taps; three walks leave few sums to hold."""
    w, rows = tl.arange(0, BW), tl.arange(0, BH)
    left = tl.zeros((c.shape[0], BH, BW), tl.float32)
    middle = tl.zeros((c.shape[0], BH, BW), tl.float32)
    right = tl.zeros((c.shape[0], BH, BW), tl.float32)
    for h0 in range(0, x.H, BH):
        h = h0 + rows
        at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
        block = tl.load(x.start + at, mask=mask, other=0.0).to(tl.float32)
        seen = own.dl + pixels_at(x, h, w) - dy * (x.W + 2)
        left += block * tl.load(seen + 1)[None, :, :]
        middle += block * tl.load(seen)[None, :, :]
        right += block * tl.load(seen - 1)[None, :, :]
    taps = own.parts + 3 * (dy + 1) * n
    store_vector(taps, tl.sum(tl.sum(left, axis=2), axis=1), c, n)
    store_vector(taps + n, tl.sum(tl.sum(middle, axis=2), axis=1), c, n)
    store_vector(taps + 2 * n, tl.sum(tl.sum(right, axis=2), axis=1), c, n)


@triton.jit
def finish_vectors(x, kept, own, weights, dl_sum, n: tl.constexpr, PN: tl.constexpr):
    """Write dm, dγ, dβ, what the norm's gradient needs and what reaches x through the taps."""
    o = tl.arange(0, PN)
    u, y_dot = load_vector(kept.u, o, n), load_vector(own.dots, o, n)
    gamma, beta = load_vector(weights.gn_weight, o, n), load_vector(weights.gn_bias, o, n)
    du = gamma * y_dot + beta * dl_sum
    dm = u * (du - tl.sum(u * du, axis=0))
    store_vector(own.parts + 9 * n, dm, o, n)
    store_vector(own.parts + 10 * n, u * y_dot, o, n)
    store_vector(own.parts + 11 * n, u * dl_sum, o, n)
    r = load_vector(kept.r, o, n)
    slope = r * y_dot / (x.H * x.W)
    store_vector(own.slopes, u * gamma * r, o, n)
    store_vector(own.slopes + n, slope, o, n)
    level = dl_sum / (x.H * x.W) - load_vector(kept.rest, o, n) * slope
    store_vector(own.slopes + 2 * n, level, o, n)
    for k0 in range(0, 9 * n, 32):
        k = k0 + tl.arange(0, 32)
        at = o[:, None] * (9 * n) + k[None, :]
        mask = (o < n)[:, None] & (k < 9 * n)[None, :]
        votes = tl.load(weights.vote_weight + at, mask=mask, other=0.0)
        reached = tl.sum(votes * dm[:, None], axis=0) / (x.H * x.W)
        tl.store(own.taps + k, reached, mask=k < 9 * n)


class Slope(NamedTuple):
    """What the norm's gradient needs: dy = coef·(dL − level − (y − μ)·slope), (BN,) each.

    Attributes:
        mean: μ, but for what its rounding leaves.
        coef: uγr.
        slope: r·mean(dL·ŷ).
        level: mean dL, and what the rounding of μ leaves.
    """

    mean: Any
    coef: Any
    slope: Any
    level: Any


@triton.jit
def slope_of(kept, own, c, n: tl.constexpr):
    """`Slope` of the channels c."""
    coef, slope = load_vector(own.slopes, c, n), load_vector(own.slopes + n, c, n)
    return Slope(load_vector(kept.mean, c, n), coef, slope, load_vector(own.slopes + 2 * n, c, n))


@triton.jit
def norm_gradient(block, gate_h, gate_w, dl, of):
    """Dy / coef, (BN, BH, BW), from gates (BN, BH) and (BN, BW) and dL (BH, BW)."""
    y = block * gate_h[:, :, None] * gate_w[:, None, :] - of.mean[:, None, None]
    return (dl[None, :, :] - of.level[:, None, None]) - y * of.slope[:, None, None]


@triton.jit
def line_gradients(
    x, kept, own, n: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr
):
    """Write [dp | dq], the gradient before the gates of all lines."""
    w, rows = tl.arange(0, BW), tl.arange(0, BH)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        of = slope_of(kept, own, c, n)
        gate_w = load_columns(kept.gates, x, c, w, n)
        dq = tl.zeros((BN, BH, BW), tl.float32)
        for h0 in range(0, x.H, BH):
            h = h0 + rows
            at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
            block = tl.load(x.start + at, mask=mask, other=0.0).to(tl.float32)
            gate_h = load_rows(kept.gates, x, c, h, n)
            dl = tl.load(own.dl + pixels_at(x, h, w))
            product = norm_gradient(block, gate_h, gate_w, dl, of) * block
            dq += product * gate_h[:, :, None]
            dp = tl.sum(product * gate_w[:, None, :], axis=2)
            dp *= of.coef[:, None] * gate_h * (1 - gate_h)
            store_lines(own.mixed, dp, x, c, 0, h, x.H, n)
        found = tl.sum(dq, axis=1) * of.coef[:, None] * gate_w * (1 - gate_w)
        store_lines(own.mixed, found, x, c, x.H, w, x.W, n)


@triton.jit
def mix_gradient(
    x, own, weights, n: tl.constexpr, BX: tl.constexpr, BL: tl.constexpr, PN: tl.constexpr
):
    """Write db₁, dW₁, and what reaches x through its lines, the votes' taps among them."""
    i = tl.arange(0, PN)
    L = x.H + x.W
    dw1 = tl.zeros((PN, PN, BX), tl.float32)
    db1 = tl.zeros((PN, BX), tl.float32)
    for l0 in range(0, L, BX):
        p = l0 + tl.arange(0, BX)
        mixed = load_lines(own.mixed, x, i, 0, p, L, n)
        pooled = load_lines(own.sums, x, i, 0, p, L, n)
        pooled *= tl.where(p < x.H, 1.0 / x.W, 1.0 / x.H)[None, :]
        db1 += mixed
        dw1 += mixed[:, None, :] * pooled[None, :, :]
    dw1 = tl.sum(dw1, axis=2)
    db1 = tl.sum(db1, axis=1)
    store_vector(own.parts + 12 * n, db1, i, n)
    at, mask = i[:, None] * n + i[None, :], (i < n)[:, None] & (i < n)[None, :]
    tl.store(own.parts + 13 * n + at, dw1, mask=mask)
    everywhere = tl.zeros((PN,), tl.float32)
    first_row, last_row = tl.zeros((PN,), tl.float32), tl.zeros((PN,), tl.float32)
    first_column, last_column = tl.zeros((PN,), tl.float32), tl.zeros((PN,), tl.float32)
    for tap in tl.static_range(9):
        reached = tl.load(own.taps + i * 9 + tap, mask=i < n, other=0.0)
        everywhere += reached
        if tap // 3 == 0:
            last_row += reached
        if tap // 3 == 2:
            first_row += reached
        if tap % 3 == 0:
            last_column += reached
        if tap % 3 == 2:
            first_column += reached
    for l0 in range(0, L, BL):
        p = l0 + tl.arange(0, BL)
        terms = tl.zeros((PN, BL), tl.float32)
        for o in range(n):
            mixed = tl.load(own.mixed + o * x.lc + p * x.l, mask=p < L, other=0.0)
            row = tl.load(weights.mix_weight + o * n + i, mask=i < n, other=0.0)
            terms += row[:, None] * mixed[None, :]
        terms *= tl.where(p < x.H, 1.0 / x.W, 1.0 / x.H)[None, :]
        terms += tl.where((p < x.H)[None, :], everywhere[:, None], 0.0)
        terms -= tl.where((p == 0)[None, :], first_row[:, None], 0.0)
        terms -= tl.where((p == x.H - 1)[None, :], last_row[:, None], 0.0)
        terms -= tl.where((p == x.H)[None, :], first_column[:, None], 0.0)
        terms -= tl.where((p == L - 1)[None, :], last_column[:, None], 0.0)
        store_lines(own.terms, terms, x, i, 0, p, L, n)


@triton.jit
def input_gradient(
    grad,
    x,
    dx,
    kept,
    own,
    kernel,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Write dx. What the taps see of dL is loaded once for all channels."""
    w, rows = tl.arange(0, BW), tl.arange(0, BH)
    wide = x.W + 2
    for h0 in range(0, x.H, BH):
        h = h0 + rows
        pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
        gate = tl.load(kept.gate_map + h[:, None] * x.W + w[None, :], mask=pixels, other=0.0)
        dl = own.dl + pixels_at(x, h, w)
        above, below = dl - wide, dl + wide
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
            of = slope_of(kept, own, c, n)
            block = tl.load(x.start + at, mask=mask, other=0.0).to(tl.float32)
            gate_h, gate_w = load_rows(kept.gates, x, c, h, n), load_columns(kept.gates, x, c, w, n)
            found = norm_gradient(block, gate_h, gate_w, seen[4], of)
            found *= gate_h[:, :, None] * (gate_w * of.coef[:, None])[:, None, :]
            found += load_rows(own.terms, x, c, h, n)[:, :, None]
            found += load_columns(own.terms, x, c, w, n)[:, None, :]
            for tap in tl.static_range(9):
                taps = load_vector(kernel + tap * n, c, n)
                found += taps[:, None, None] * seen[tap][None, :, :]
            incoming = tl.load(grad.start + at, mask=mask, other=0.0).to(tl.float32)
            found += incoming * gate[None, :, :]
            if (h0 == 0) | (h0 + BH >= x.H):
                found = add_corners(found, own.taps, x, c, h, w, n)
            tl.store(dx.start + at, found.to(dx.start.dtype.element_ty), mask=mask)


@triton.jit
def add_corners(found, taps, x, c, h, w, n: tl.constexpr):
    """``found`` and, where it holds corners, what was taken from them twice.

    Tap 0 loses the last row and the last column, tap 2 the last row and the first column, ...
    """
    for corner in tl.static_range(4):
        at_row = h == (x.H - 1 if corner < 2 else 0)
        at_column = w == (x.W - 1 if corner % 2 == 0 else 0)
        here = at_row[None, :, None] & at_column[None, None, :]
        value = tl.load(taps + c * 9 + (corner // 2) * 6 + (corner % 2) * 2, mask=c < n, other=0.0)
        found += tl.where(here, value[:, None, None], 0.0)
    return found
