"""Triton kernels of EMA attention for tiles that one program cannot take from end to end.

Letters and bundles are those of `ema_timm.ops.fused.bundles`. Here a tile is cut into blocks of BN
channels, BH rows and BW columns, and what belongs to the whole tile is added up between kernels,
in a fixed order. Block b of a tile is at row block b // (column blocks) and column block
b % (column blocks). Grids are (B·G, blocks, channel blocks), or (B·G, blocks) where a program
walks through the channels itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.closed_form.saved import Saved
from ema_timm.ops.fused.blocks import EPS, centred
from ema_timm.ops.fused.bundles import (
    Map,
    Size,
    kept_of,
    load_block,
    load_columns,
    load_rows,
    load_vector,
    store_block,
    store_lines,
    store_plane,
    tile_of,
)
from ema_timm.ops.weights import FoldedWeights


class LineSums(NamedTuple):
    """Each block's share of sums along rows and columns.

    Attributes:
        rows: Sums along W, (column blocks, B·G, n, H).
        columns: Sums along H, (row blocks, B·G, n, W).
    """

    rows: Any
    columns: Any


@triton.jit
def positions(size, BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Channels, rows and columns of this program's block."""
    across = tl.cdiv(size.W, BW)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h = tl.program_id(1) // across * BH + tl.arange(0, BH)
    return c, h, tl.program_id(1) % across * BW + tl.arange(0, BW)


@triton.jit
def store_sums(sums, x, along_w, along_h, c, h, w, BW: tl.constexpr):
    """Write a block's share of a sum along W and of a sum along H, (BN, BH) and (BN, BW)."""
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    across = tl.cdiv(x.W, BW)
    at = (tl.program_id(1) % across * tiles + tile) * x.n * x.H
    store_lines(sums.rows + at, along_w, c, h, x.n, x.H, x.H)
    at = (tl.program_id(1) // across * tiles + tile) * x.n * x.W
    store_lines(sums.columns + at, along_h, c, w, x.n, x.W, x.W)


@triton.jit
def pool_blocks(
    x: Map,
    sums: LineSums,  # written
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's sums of x along W and along H."""
    c, h, w = positions(size, BN, BH, BW)
    x = tile_of(x, size, n)
    block = load_block(x, c, h, w)
    store_sums(sums, x, tl.sum(block, axis=2), tl.sum(block, axis=1), c, h, w, BW)


@triton.jit
def block_statistics(
    x: Map,
    saved: Saved,
    parts,  # (3, blocks, B·G, n): mean of y, what its rounding leaves, squared deviations; written
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Mean and squared deviations of y in each block."""
    c, h, w = positions(size, BN, BH, BW)
    x, kept = tile_of(x, size, n), kept_of(saved, size, n)
    block = load_block(x, c, h, w)
    gate_h, gate_w = load_rows(kept.gates, x, c, h), load_columns(kept.gates, x, c, w)
    y = block * gate_h[:, :, None] * gate_w[:, None, :]
    pixels = (h < size.H)[None, :, None] & (w < size.W)[None, None, :]
    count = tl.sum(tl.sum(tl.where(pixels, 1.0, 0.0), axis=2), axis=1)
    mean = tl.sum(tl.sum(y, axis=2), axis=1) / count
    y = tl.where(pixels, y - mean[:, None, None], 0.0)
    rest = tl.sum(tl.sum(y, axis=2), axis=1) / count
    squares = tl.sum(tl.sum(y * y, axis=2), axis=1) - count * rest * rest
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = (tl.program_id(1) * tiles + tile) * n + c
    step = tl.num_programs(1) * tiles.to(tl.int64) * n
    tl.store(parts + at, mean, mask=c < n)
    tl.store(parts + step + at, rest, mask=c < n)
    tl.store(parts + 2 * step + at, squares, mask=c < n)


@triton.jit
def merge_statistics(
    parts,  # (3, blocks, B·G, n)
    saved: Saved,  # mean, its rest and 1/std are written
    blocks,
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BB: tl.constexpr,
):
    """Mean, its rest and 1/std of each tile from those of its blocks. Grid (B·G, channel blocks).

    Chan et al., 1979: deviations within the blocks, plus deviations between their means.
    """
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    kept = kept_of(saved, size, n)
    step = blocks * tl.num_programs(0).to(tl.int64) * n
    area = size.H * size.W
    mean = tl.zeros((BN,), tl.float32)
    for b0 in range(0, blocks, BB):
        b = b0 + tl.arange(0, BB)
        at, known, weight = blocks_at(b, c, blocks, size, n, BH, BW)
        mean += tl.sum(weight * tl.load(parts + at, mask=known, other=0.0), axis=0)
    rest = tl.zeros((BN,), tl.float32)
    var = tl.zeros((BN,), tl.float32)
    for b0 in range(0, blocks, BB):
        b = b0 + tl.arange(0, BB)
        at, known, weight = blocks_at(b, c, blocks, size, n, BH, BW)
        off = tl.load(parts + at, mask=known, other=0.0) - mean[None, :]
        off = tl.where(known, off, 0.0) + tl.load(parts + step + at, mask=known, other=0.0)
        squares = tl.load(parts + 2 * step + at, mask=known, other=0.0)
        rest += tl.sum(weight * off, axis=0)
        var += tl.sum(squares / area + weight * off * off, axis=0)
    r = tl.rsqrt(tl.maximum(var - rest * rest, 0.0) + EPS)
    tl.store(kept.mean + c, mean, mask=c < n)
    tl.store(kept.rest + c, rest, mask=c < n)
    tl.store(kept.r + c, r, mask=c < n)


@triton.jit
def blocks_at(b, c, blocks, size, n: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Where numbers of the blocks ``b`` are, which exist, and which part of the tile each block is.

    (BB, BN), (BB, BN) and (BB, 1).
    """
    across = tl.cdiv(size.W, BW)
    rows = tl.minimum(BH, size.H - b // across * BH)
    count = rows * tl.minimum(BW, size.W - b % across * BW)
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = (b.to(tl.int64)[:, None] * tiles + tile) * n + c[None, :]
    known = (b < blocks)[:, None] & (c < n)[None, :]
    return at, known, tl.where(b < blocks, count / (size.H * size.W), 0.0)[:, None]


@triton.jit
def apply_gate(
    x: Map,
    out: Map,
    saved: Saved,  # the gate map is written where SAVE
    weights: FoldedWeights,
    size: Size,
    n: tl.constexpr,
    SAVE: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Gate a block of pixels, all channels. Grid (B·G, blocks)."""
    first, h, w = positions(size, BN, BH, BW)
    x, out, kept = tile_of(x, size, n), tile_of(out, size, n), kept_of(saved, size, n)
    logits = tl.zeros((BH, BW), tl.float32)
    for c0 in range(0, n, BN):
        logits = add_channels(logits, x, kept, weights, c0 + first, h, w)
    gate = tl.sigmoid(logits)
    if SAVE:
        store_plane(kept.gate_map, x, gate, h, w)
    for c0 in range(0, n, BN):
        c = c0 + first
        store_block(out, load_block(x, c, h, w) * gate[None, :, :], c, h, w)


@triton.jit
def add_channels(logits, x, kept, weights, c, h, w):
    """``logits`` (BH, BW) and what the channels ``c`` bring to L: the norm, then identity b."""
    u, r = load_vector(kept.u, c, x.n), load_vector(kept.r, c, x.n)
    coef = u * load_vector(weights.gn_weight, c, x.n) * r
    gate_h, gate_w = load_rows(kept.gates, x, c, h), load_columns(kept.gates, x, c, w)
    mean, rest = load_vector(kept.mean, c, x.n), load_vector(kept.rest, c, x.n)
    y = centred(load_block(x, c, h, w), gate_h, gate_w, mean, rest)
    logits += tl.sum(y * coef[:, None, None], axis=0)
    logits += tl.sum(u * load_vector(weights.gn_bias, c, x.n), axis=0)
    for tap in tl.static_range(9):
        near = load_block(x, c, h + (tap // 3 - 1), w + (tap % 3 - 1))
        taps = load_vector(weights.kernel + tap * x.n, c, x.n)
        logits += tl.sum(near * taps[:, None, None], axis=0)
    return logits
