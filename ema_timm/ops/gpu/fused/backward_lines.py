"""Gradients of the lines of a tile in the backward of EMA attention, and of x through them.

Letters and arguments are those of `ema_timm.ops.gpu.fused.kernel_args`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.gpu.fused.backward_sums import pixels_at
from ema_timm.ops.gpu.fused.kernel_args import (
    inside,
    load_columns,
    load_lines,
    load_row_of,
    load_rows,
    places,
    store_lines,
    store_vector,
    widened,
)


class Slope(NamedTuple):
    """Terms of the norm's gradient: dy = coef·dL − level − (y − μ)·slope, (BN,) each.

    Attributes:
        coef: uγr.
        slope: coef·r·mean(dL·ŷ).
        level: coef·mean dL, corrected by the rounding residual of μ.
        mean: μ as it was rounded.
    """

    coef: Any
    slope: Any
    level: Any
    mean: Any


@triton.jit
def slope_of(own, c, n: tl.constexpr):
    """`Slope` of the channels c."""
    first = own.slopes + c
    coef, slope = load_row_of(first, 0, c, n), load_row_of(first, 1, c, n)
    return Slope(coef, slope, load_row_of(first, 2, c, n), load_row_of(first, 3, c, n))


@triton.jit
def norm_gradient(y, dl, of):
    """Dy, (BN, BH, BW), from y and dL (BH, BW)."""
    level = dl[None, :, :] * of.coef[:, None, None] - of.level[:, None, None]
    return level - (y - of.mean[:, None, None]) * of.slope[:, None, None]


@triton.jit
def line_gradients(
    x,
    saved,
    own,
    n: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BA: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
):
    """Write [dp | dq], the gradient before the gates of all lines, and the sums of x along them.

    Passes are those of `ema_timm.ops.gpu.fused.steps.pool`.
    """
    if LAST:
        for c0 in range(0, n, BA):
            c = c0 + tl.arange(0, BA)
            for p0 in range(0, x.W, BP):
                p = p0 + tl.arange(0, BP)
                found, pooled = across(
                    x, saved, own, c, x.H, p, x.w, x.W, 0, x.h, x.H, n, BQ, False
                )
                store_lines(own.mixed, found, x, c, x.H, p, x.W, n)
                store_lines(own.sums, pooled, x, c, x.H, p, x.W, n)
            total = tl.zeros((BA,), tl.float32)
            for p0 in range(0, x.H, BP):
                p = p0 + tl.arange(0, BP)
                found, pooled = across(x, saved, own, c, 0, p, x.h, x.H, x.H, x.w, x.W, n, BQ, True)
                store_lines(own.mixed, found, x, c, 0, p, x.H, n)
                store_lines(own.sums, pooled, x, c, 0, p, x.H, n)
                total += tl.sum(pooled, axis=1)
            store_vector(own.totals, total, c, n)
    else:
        w, rows = tl.arange(0, BW), tl.arange(0, BH)
        for c0 in range(0, n, BN):
            c = c0 + tl.arange(0, BN)
            of = slope_of(own, c, n)
            gate_w = load_columns(saved.gates, x, c, w, n)
            dq, columns = tl.zeros((BN, BH, BW), tl.float32), tl.zeros((BN, BH, BW), tl.float32)
            for h0 in range(0, x.H, BH):
                h = h0 + rows
                at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
                block = widened(tl.load(x.start + at, mask=mask, other=0.0))
                gate_h = load_rows(saved.gates, x, c, h, n)
                dl = tl.load(own.dl + pixels_at(x, h, w))
                across_h, across_w = block * gate_w[:, None, :], block * gate_h[:, :, None]
                dy = norm_gradient(across_h * gate_h[:, :, None], dl, of)
                columns += block
                dq += dy * across_w
                dp = tl.sum(dy * across_h, axis=2) * gate_h * (1 - gate_h)
                store_lines(own.mixed, dp, x, c, 0, h, x.H, n)
                store_lines(own.sums, tl.sum(block, axis=2), x, c, 0, h, x.H, n)
            found = tl.sum(dq, axis=1) * gate_w * (1 - gate_w)
            pooled = tl.sum(columns, axis=1)
            store_lines(own.mixed, found, x, c, x.H, w, x.W, n)
            store_lines(own.sums, pooled, x, c, x.H, w, x.W, n)
            store_vector(own.totals, tl.sum(pooled, axis=1), c, n)


@triton.jit
def across(
    x,
    saved,
    own,
    c,
    first,
    p,
    step_p,
    P,
    other,
    step_q,
    Q,
    n: tl.constexpr,
    BQ: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients before the gates of the lines ``first`` + p, and their sums of x, (BN, BP).

    Steps are those of x along p and q; the lines that cross these are ``other`` + q.
    """
    of, gate = slope_of(own, c, n), load_lines(saved.gates, x, c, first, p, P, n)
    found = tl.zeros((c.shape[0], BQ, p.shape[0]), tl.float32)
    pooled = tl.zeros((c.shape[0], BQ, p.shape[0]), tl.float32)
    q = tl.arange(0, BQ)
    at = (c * x.c)[:, None, None] + ((q * step_q)[:, None] + (p * step_p)[None, :])[None, :, :]
    wide = x.W + 2
    for q0 in range(0, Q, BQ):
        here = (q < Q - q0)[:, None] & (p < P)[None, :]
        mask = here[None, :, :]
        if n // c.shape[0] * c.shape[0] != n:
            mask = mask & (c < n)[:, None, None]
        block = widened(tl.load(x.start + q0 * step_q + at, mask=mask, other=0.0))
        if ROWS:
            pixels = (p + 1)[None, :] * wide + (q0 + q + 1)[:, None]
        else:
            pixels = (q0 + q + 1)[:, None] * wide + (p + 1)[None, :]
        dl = tl.load(own.dl + pixels, mask=here, other=0.0)
        crossing = load_lines(saved.gates, x, c, other, q0 + q, Q, n)
        part = block * crossing[:, :, None]
        found += norm_gradient(part * gate[:, None, :], dl, of) * part
        pooled += block
    return tl.sum(found, axis=1) * gate * (1 - gate), tl.sum(pooled, axis=1)


@triton.jit
def mix_gradient(
    x, own, weights, n: tl.constexpr, BX: tl.constexpr, BL: tl.constexpr, PN: tl.constexpr
):
    """Write db₁, dW₁, and the gradient that reaches x through its lines, with that of the taps."""
    i = tl.arange(0, PN)
    L = x.H + x.W
    dw1 = tl.zeros((PN, PN, BX), tl.float32)
    db1 = tl.zeros((PN, BX), tl.float32)
    for p0 in range(0, L, BX):
        p = p0 + tl.arange(0, BX)
        mixed = load_lines(own.mixed, x, i, 0, p, L, n)
        pooled = load_lines(own.sums, x, i, 0, p, L, n)
        pooled *= tl.where(p < x.H, 1.0 / x.W, 1.0 / x.H)[None, :]
        db1 += mixed
        dw1 += mixed[:, None, :] * pooled[None, :, :]
    dw1 = tl.sum(dw1, axis=2)
    db1 = tl.sum(db1, axis=1)
    store_vector(own.parts + 13 * n, db1, i, n)
    at, mask = i[:, None] * n + i[None, :], (i < n)[:, None] & (i < n)[None, :]
    tl.store(own.parts + 14 * n + at, dw1, mask=mask)
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
    for p0 in range(0, L, BL):
        p = p0 + tl.arange(0, BL)
        terms = tl.zeros((PN, BL), tl.float32)
        for o in range(n):
            mixed = tl.load(own.mixed + o * x.lc + p * x.lp, mask=p < L, other=0.0)
            row = tl.load(weights.mix_weight + o * n + i, mask=i < n, other=0.0)
            terms += row[:, None] * mixed[None, :]
        terms *= tl.where(p < x.H, 1.0 / x.W, 1.0 / x.H)[None, :]
        terms += tl.where((p < x.H)[None, :], everywhere[:, None], 0.0)
        terms -= tl.where((p == 0)[None, :], first_row[:, None], 0.0)
        terms -= tl.where((p == x.H - 1)[None, :], last_row[:, None], 0.0)
        terms -= tl.where((p == x.H)[None, :], first_column[:, None], 0.0)
        terms -= tl.where((p == L - 1)[None, :], last_column[:, None], 0.0)
        store_lines(own.terms, terms, x, i, 0, p, L, n)
