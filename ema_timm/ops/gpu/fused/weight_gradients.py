"""Triton kernel of EMA attention: gradients of the parameters from every tile's share of them.

T = B·G tiles. A program computes a block of one gradient, or of several neighbours, and passes over
all tiles in order: the result has the same bits every time. Column j of ``parts`` belongs to one
parameter, except the first 10n: the gradient of the 3×3 convolution is
Σ_tiles dm ⊗ means + v ⊗ Σ_tiles dk.
"""

import triton
import triton.language as tl

from ema_timm.ops.weights import EmaWeights


@triton.jit
def sum_tiles(
    parts,  # (T, 14n + n²), as `ema_timm.ops.gpu.fused.backward.Scratch` has it
    means,  # (T, 9n)
    v,  # (n,)
    found: EmaWeights,  # written
    tiles,
    n: tl.constexpr,
    BO: tl.constexpr,  # rows and columns of a block of the 3×3 convolution's gradient
    BK: tl.constexpr,
    BT: tl.constexpr,  # tiles a step there
    BJ: tl.constexpr,  # columns of ``parts`` that are summed at once elsewhere, and tiles a step
    BS: tl.constexpr,
):
    """Every gradient of a parameter; grid and blocks as in `tiling.blocks_over_tiles`."""
    program = tl.program_id(0)
    across: tl.constexpr = (9 * n + BK - 1) // BK
    products: tl.constexpr = (n + BO - 1) // BO * across
    if program < products:
        o = program // across * BO + tl.arange(0, BO)
        k = program % across * BK + tl.arange(0, BK)
        convolution_gradient(parts, means, v, found.conv3x3_weight, tiles, o, k, n, BT)
    else:
        column_sums(parts, found, tiles, (program - products) * BJ + tl.arange(0, BJ), n, BS)


@triton.jit
def convolution_gradient(parts, means, v, out, tiles, o, k, n: tl.constexpr, BT: tl.constexpr):
    """Write a block of the 3×3 convolution's gradient, at outputs ``o`` and inputs' taps ``k``."""
    t = tl.arange(0, BT)
    width: tl.constexpr = 14 * n + n * n
    at_dm, at_dk = t[:, None] * width + (9 * n + o)[None, :], t[:, None] * width + k[None, :]
    at_means = t[:, None] * (9 * n) + k[None, :]
    through_u = tl.zeros((o.shape[0], k.shape[0]), tl.float32)
    dk = tl.zeros((BT, k.shape[0]), tl.float32)
    for t0 in range(0, tiles, BT):
        here = (t < tiles - t0)[:, None]
        dm = tl.load(parts + at_dm, mask=here & (o < n)[None, :], other=0.0)
        seen = tl.load(means + at_means, mask=here & (k < 9 * n)[None, :], other=0.0)
        through_u = tl.dot(tl.trans(dm), seen, through_u, input_precision="ieee")
        dk += tl.load(parts + at_dk, mask=here & (k < 9 * n)[None, :], other=0.0)
        parts += BT * width
        means += BT * (9 * n)
    share = tl.load(v + o, mask=o < n, other=0.0)
    total = through_u + share[:, None] * tl.sum(dk, axis=0)[None, :]
    mask = (o < n)[:, None] & (k < 9 * n)[None, :]
    tl.store(out + o[:, None] * (9 * n) + k[None, :], total, mask=mask)


@triton.jit
def column_sums(parts, found, tiles, j, n: tl.constexpr, BS: tl.constexpr):
    """Write the gradients whose columns of ``parts`` are 10n + ``j``: all but the 3×3 weights'."""
    t = tl.arange(0, BS)
    width: tl.constexpr = 14 * n + n * n
    at = t[:, None] * width + (10 * n + j)[None, :]
    total = tl.zeros((BS, j.shape[0]), tl.float32)
    for t0 in range(0, tiles, BS):
        mask = (t < tiles - t0)[:, None] & (j < 4 * n + n * n)[None, :]
        total += tl.load(parts + at, mask=mask, other=0.0)
        parts += BS * width
    total = tl.sum(total, axis=0)
    tl.store(found.gn_weight + j, total, mask=j < n)
    tl.store(found.gn_bias + (j - n), total, mask=(j >= n) & (j < 2 * n))
    tl.store(found.conv3x3_bias + (j - 2 * n), total, mask=(j >= 2 * n) & (j < 3 * n))
    tl.store(found.conv1x1_bias + (j - 3 * n), total, mask=(j >= 3 * n) & (j < 4 * n))
    mask = (j >= 4 * n) & (j < 4 * n + n * n)
    tl.store(found.conv1x1_weight + (j - 4 * n), total, mask=mask)
