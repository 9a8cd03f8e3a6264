"""Triton kernels of EMA attention: the backward of a tile that is cut into blocks.

Letters and bundles are those of `ema_timm.ops.fused.bundles`, blocks and grids those of
`ema_timm.ops.fused.split_tile`; dL comes from `ema_timm.ops.fused.whole_tile_backward`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ema_timm.ops.closed_form.saved import Saved
from ema_timm.ops.fused.blocks import Slope, centred, kernel_gradient, norm_gradient, spread
from ema_timm.ops.fused.bundles import (
    Map,
    Size,
    kept_of,
    load_block,
    load_columns,
    load_plane,
    load_rows,
    load_vector,
    store_block,
    tile_of,
)
from ema_timm.ops.fused.split_tile import LineSums, positions, store_sums


class NormTerms(NamedTuple):
    """What the norm's backward needs of the whole tile.

    Attributes:
        dl_means: Mean of dL, (B·G,).
        slopes: r·mean(dL·ŷ), (B·G, n).
        gn_weight: γ, (n,).
    """

    dl_means: Any
    slopes: Any
    gn_weight: Any


@triton.jit
def block_gradient_sums(
    x: Map,
    saved: Saved,
    dl,  # dL, (B·G, H, W)
    parts,  # (blocks, B·G, 10, n): dk, then Σ dL·(y − μ); written
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's share of dk and of Σ dL·(y − μ)."""
    c, h, w = positions(size, BN, BH, BW)
    t = tl.arange(0, 16)
    x, kept = tile_of(x, size, n), kept_of(saved, size, n)
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    block = load_block(x, c, h, w)
    gate_h, gate_w = load_rows(kept.gates, x, c, h), load_columns(kept.gates, x, c, w)
    mean, rest = load_vector(kept.mean, c, n), load_vector(kept.rest, c, n)
    y = centred(block, gate_h, gate_w, mean, rest)
    dl += tile * size.H * size.W
    y_dot = tl.sum(tl.sum(y * load_plane(dl, x, h, w)[None, :, :], axis=2), axis=1)
    dk = kernel_gradient(dl, x, block, h, w, t)
    found = tl.where((t == 9)[None, :], y_dot[:, None], dk)
    at = (tl.program_id(1) * tiles + tile) * 10 * n + t[None, :] * n + c[:, None]
    tl.store(parts + at, found, mask=(c < n)[:, None] & (t < 10)[None, :])


@triton.jit
def block_norm_gradient(block, gate_h, gate_w, x, kept, dl, norm, c, h, w):
    """Dy of a block, (BN, BH, BW); ``dl`` is the tile's own."""
    tile = tl.program_id(0).to(tl.int64)
    mean, rest = load_vector(kept.mean, c, x.n), load_vector(kept.rest, c, x.n)
    r = load_vector(kept.r, c, x.n)
    coef = load_vector(kept.u, c, x.n) * load_vector(norm.gn_weight, c, x.n) * r
    y = centred(block, gate_h, gate_w, mean, rest)
    slopes = load_vector(norm.slopes + tile * x.n, c, x.n)
    slope = Slope(coef, slopes, tl.load(norm.dl_means + tile))
    return norm_gradient(y, load_plane(dl, x, h, w), slope)


@triton.jit
def block_gate_gradients(
    x: Map,
    saved: Saved,
    dl,  # (B·G, H, W)
    norm: NormTerms,
    sums: LineSums,  # written
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's sums of dy·x·s_w along W and dy·x·s_h along H."""
    c, h, w = positions(size, BN, BH, BW)
    x, kept = tile_of(x, size, n), kept_of(saved, size, n)
    dl += tl.program_id(0).to(tl.int64) * size.H * size.W
    block = load_block(x, c, h, w)
    gate_h, gate_w = load_rows(kept.gates, x, c, h), load_columns(kept.gates, x, c, w)
    dy = block_norm_gradient(block, gate_h, gate_w, x, kept, dl, norm, c, h, w)
    product = dy * block
    along_w = tl.sum(product * gate_w[:, None, :], axis=2)
    along_h = tl.sum(product * gate_h[:, :, None], axis=1)
    store_sums(sums, x, along_w, along_h, c, h, w, BW)


@triton.jit
def input_gradient(
    grad: Map,
    x: Map,
    dx: Map,
    saved: Saved,
    dl,  # (B·G, H, W)
    norm: NormTerms,
    kernel,  # (9, n)
    terms,  # (B·G, n, H + W): what reaches a pixel through its row and its column
    taps,  # (B·G, n, 9): what reaches a corner
    size: Size,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """The gradient of x in one block."""
    c, h, w = positions(size, BN, BH, BW)
    x, grad, dx = tile_of(x, size, n), tile_of(grad, size, n), tile_of(dx, size, n)
    kept = kept_of(saved, size, n)
    tile = tl.program_id(0).to(tl.int64)
    dl += tile * size.H * size.W
    terms += tile * n * (size.H + size.W)
    block = load_block(x, c, h, w)
    gate_h, gate_w = load_rows(kept.gates, x, c, h), load_columns(kept.gates, x, c, w)
    dy = block_norm_gradient(block, gate_h, gate_w, x, kept, dl, norm, c, h, w)
    found = dy * gate_h[:, :, None] * gate_w[:, None, :]
    found += spread(dl, kernel, x, c, h, w)
    found += load_rows(terms, x, c, h)[:, :, None]
    found += load_columns(terms, x, c, w)[:, None, :]
    found = add_corners(found, taps + (tile * n + c) * 9, x, c, h, w)
    gate = load_plane(kept.gate_map, x, h, w)
    found += load_block(grad, c, h, w) * gate[None, :, :]
    store_block(dx, found, c, h, w)


@triton.jit
def add_corners(block, taps, x, c, h, w):
    """``block`` and, where it holds corners, what reaches them; ``taps`` are each channel's nine.

    Tap 0 loses the last row and the last column, tap 2 the last row and the first column, ...
    """
    for corner in tl.static_range(4):
        at_row = h == (x.H - 1 if corner < 2 else 0)
        at_column = w == (x.W - 1 if corner % 2 == 0 else 0)
        here = at_row[None, :, None] & at_column[None, None, :]
        tap = (corner // 2) * 6 + (corner % 2) * 2
        value = tl.load(taps + tap, mask=c < x.n, other=0.0)
        block += tl.where(here, value[:, None, None], 0.0)
    return block
