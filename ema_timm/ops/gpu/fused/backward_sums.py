"""Sums over a tile that the backward of EMA attention begins with.

Letters and arguments are those of `ema_timm.ops.gpu.fused.kernel_args`. dL has no channels. It is
stored in scratch memory with a border of zeros, so that its neighbours can be read without a check
for the end of the map.
"""

import triton
import triton.language as tl

from ema_timm.ops.gpu.fused.kernel_args import (
    inside,
    load_columns,
    load_rows,
    load_vector,
    places,
    store_vector,
    widened,
)
from ema_timm.ops.gpu.fused.steps import centred, mean_of_columns, sum_pixels


@triton.jit
def gate_gradient(
    grad, x, saved, dl, n: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
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
            block = widened(tl.load(x.start + h0 * x.h + at, mask=mask, other=0.0))
            seen = widened(tl.load(grad.start + h0 * x.h + at, mask=mask, other=0.0))
            products += block * seen
        pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
        gate = tl.load(saved.gate_map + h[:, None] * x.W + w[None, :], mask=pixels, other=0.0)
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
    """Offsets of dL of a block of pixels; positions outside the map get its first pixel."""
    pixels = (h < x.H)[:, None] & (w < x.W)[None, :]
    wide = x.W + 2
    return tl.where(pixels, (h + 1)[:, None] * wide + (w + 1)[None, :], wide + 1)


@triton.jit
def kernel_gradient(
    x,
    saved,
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
            w, rows = tl.arange(0, BW), tl.arange(0, BH)
            gate_w = load_columns(saved.gates, x, c, w, n)
            mean_w = mean_of_columns(x, load_vector(saved.mean, c, n), w)
            y_dot = tl.zeros((BN, BH, BW), tl.float32)
            for h0 in range(0, x.H, BH):
                h = h0 + rows
                at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
                block = widened(tl.load(x.start + at, mask=mask, other=0.0))
                dl = tl.load(own.dl + pixels_at(x, h, w))
                gate_h = load_rows(saved.gates, x, c, h, n)
                y_dot += centred(x, block, gate_h, gate_w, mean_w, h, h0) * dl[None, :, :]
        else:
            y_dot = sum_taps(x, saved, own, c, n, BH, BW)
        dot = sum_pixels(y_dot) - load_vector(saved.rest, c, n) * dl_sum
        store_vector(own.dots, dot * load_vector(saved.r, c, n), c, n)


@triton.jit
def multiply_taps(x, own, c, n: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Write dk of the channels c: the product of shifted dL and x, summed over pixels."""
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
            high = (seen.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            dk = tl.dot(high, block.to(tl.float32), dk, input_precision="tf32")
            dk = tl.dot(seen - high, block.to(tl.float32), dk, input_precision="tf32")
    at = t[:, None] + 9 * c[None, :]
    tl.store(own.parts + at, dk, mask=(t < 9)[:, None] & (c < n)[None, :])


@triton.jit
def sum_taps(x, saved, own, c, n: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Write dk of the channels c; returns dL·(y − μ), to be summed: (BN, BH, BW)."""
    w, rows = tl.arange(0, BW), tl.arange(0, BH)
    below_right = tl.zeros((c.shape[0], BH, BW), tl.float32)
    below_same = tl.zeros((c.shape[0], BH, BW), tl.float32)
    below_left = tl.zeros((c.shape[0], BH, BW), tl.float32)
    right = tl.zeros((c.shape[0], BH, BW), tl.float32)
    same = tl.zeros((c.shape[0], BH, BW), tl.float32)
    left = tl.zeros((c.shape[0], BH, BW), tl.float32)
    above_right = tl.zeros((c.shape[0], BH, BW), tl.float32)
    above_same = tl.zeros((c.shape[0], BH, BW), tl.float32)
    above_left = tl.zeros((c.shape[0], BH, BW), tl.float32)
    y_dot = tl.zeros((c.shape[0], BH, BW), tl.float32)
    gate_w = load_columns(saved.gates, x, c, w, n)
    mean_w = mean_of_columns(x, load_vector(saved.mean, c, n), w)
    for h0 in range(0, x.H, BH):
        h = h0 + rows
        at, mask = h0 * x.h + places(x, c, rows, w), inside(x, c, h, w, n)
        block = widened(tl.load(x.start + at, mask=mask, other=0.0))
        here = own.dl + pixels_at(x, h, w)
        above, below = here - (x.W + 2), here + (x.W + 2)
        below_right += block * tl.load(below + 1)[None, :, :]
        below_same += block * tl.load(below)[None, :, :]
        below_left += block * tl.load(below - 1)[None, :, :]
        right += block * tl.load(here + 1)[None, :, :]
        dl = tl.load(here)[None, :, :]
        same += block * dl
        left += block * tl.load(here - 1)[None, :, :]
        above_right += block * tl.load(above + 1)[None, :, :]
        above_same += block * tl.load(above)[None, :, :]
        above_left += block * tl.load(above - 1)[None, :, :]
        gate_h = load_rows(saved.gates, x, c, h, n)
        y_dot += centred(x, block, gate_h, gate_w, mean_w, h, h0) * dl
    store_vector(own.parts + 0, sum_pixels(below_right), 9 * c, 9 * n)
    store_vector(own.parts + 1, sum_pixels(below_same), 9 * c, 9 * n)
    store_vector(own.parts + 2, sum_pixels(below_left), 9 * c, 9 * n)
    store_vector(own.parts + 3, sum_pixels(right), 9 * c, 9 * n)
    store_vector(own.parts + 4, sum_pixels(same), 9 * c, 9 * n)
    store_vector(own.parts + 5, sum_pixels(left), 9 * c, 9 * n)
    store_vector(own.parts + 6, sum_pixels(above_right), 9 * c, 9 * n)
    store_vector(own.parts + 7, sum_pixels(above_same), 9 * c, 9 * n)
    store_vector(own.parts + 8, sum_pixels(above_left), 9 * c, 9 * n)
    return y_dot


@triton.jit
def finish_vectors(x, saved, own, weights, v, dl_sum, n: tl.constexpr, PN: tl.constexpr):
    """Write dm, dγ, dβ, db₃, the terms of the norm's gradient and the gradients of the taps."""
    o = tl.arange(0, PN)
    u, y_dot = load_vector(saved.u, o, n), load_vector(own.dots, o, n)
    gamma, beta = load_vector(weights.gn_weight, o, n), load_vector(weights.gn_bias, o, n)
    du = gamma * y_dot + beta * dl_sum
    dm = u * (du - tl.sum(u * du, axis=0))
    r = load_vector(saved.r, o, n)
    slope = r * y_dot / (x.H * x.W)
    coef = u * gamma * r
    store_vector(own.slopes, coef, o, n)
    store_vector(own.slopes + n, coef * slope, o, n)
    level = dl_sum / (x.H * x.W) - load_vector(saved.rest, o, n) * slope
    store_vector(own.slopes + 2 * n, coef * level, o, n)
    store_vector(own.slopes + 3 * n, load_vector(saved.mean, o, n), o, n)
    products = tl.zeros((PN, 32), tl.float32)
    for k0 in range(0, 9 * n, 32):
        k = k0 + tl.arange(0, 32)
        at = o[:, None] * (9 * n) + k[None, :]
        mask = (o < n)[:, None] & (k < 9 * n)[None, :]
        rows = tl.load(weights.vote_weight + at, mask=mask, other=0.0)
        products += rows * load_vector(own.parts, k, 9 * n)[None, :]
        reached = tl.sum(rows * dm[:, None], axis=0) / (x.H * x.W)
        tl.store(own.taps + k, reached, mask=k < 9 * n)
    v = load_vector(v, o, n)
    dv = tl.sum(products, axis=1) + load_vector(weights.vote_bias, o, n) * dl_sum
    store_vector(own.parts + 9 * n, dm, o, n)
    store_vector(own.parts + 10 * n, u * y_dot, o, n)
    store_vector(own.parts + 11 * n, u * dl_sum + v * (dv - tl.sum(v * dv, axis=0)), o, n)
    store_vector(own.parts + 12 * n, v * dl_sum + dm, o, n)
