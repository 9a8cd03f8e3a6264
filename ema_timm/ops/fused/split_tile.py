"""Triton kernels of EMA attention for tiles that one program cannot take from end to end.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample,
(n, H, W). Here a tile is cut into blocks of BN channels, BH rows and BW columns, and what belongs
to the whole tile is added up between kernels, in a fixed order. Block b of a tile is at row block
b // (column blocks) and column block b % (column blocks). Grids are (B·G, blocks, channel blocks),
or (B·G, blocks) where a program walks through the channels itself.
"""

import triton
import triton.language as tl

from ema_timm.ops.fused.blocks import (
    EPS,
    centred,
    kernel_gradient,
    load_block,
    load_gates,
    load_lines,
    load_plane,
    load_vector,
    norm_gradient,
    spread,
    store_block,
    store_lines,
    store_plane,
    tile_start,
)


@triton.jit
def block_rows(W, BH: tl.constexpr, BW: tl.constexpr):
    """Rows of this program's block."""
    return tl.program_id(1) // tl.cdiv(W, BW) * BH + tl.arange(0, BH)


@triton.jit
def block_columns(W, BW: tl.constexpr):
    """Columns of this program's block."""
    return tl.program_id(1) % tl.cdiv(W, BW) * BW + tl.arange(0, BW)


@triton.jit
def store_line_sums(
    rows,  # (column blocks, B·G, n, H)
    columns,  # (row blocks, B·G, n, W)
    along_w,
    along_h,
    c,
    h,
    w,
    tiles,
    n,
    H,
    W,
    BW: tl.constexpr,
):
    """Write a block's share of a sum along W and of a sum along H, (BN, BH) and (BN, BW)."""
    tile = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(W, BW)
    at = (tl.program_id(1) % across * tiles + tile) * n * H
    store_lines(rows + at, along_w, c, h, n, H, H)
    at = (tl.program_id(1) // across * tiles + tile) * n * W
    store_lines(columns + at, along_h, c, w, n, W, W)


@triton.jit
def pool_blocks(
    x,
    rows,
    columns,
    tiles,
    groups,
    H,
    W,
    x_b,
    x_c,
    x_h,
    x_w,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's sums of x along W and along H, as `store_line_sums` lays them out."""
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h, w = block_rows(W, BH, BW), block_columns(W, BW)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
    along_w, along_h = tl.sum(block, axis=2), tl.sum(block, axis=1)
    store_line_sums(rows, columns, along_w, along_h, c, h, w, tiles, n, H, W, BW)


@triton.jit
def block_statistics(
    x,
    gates,  # (B·G, n, H + W)
    parts,  # (3, blocks, B·G, n): mean of y, what its rounding leaves, squared deviations
    tiles,
    groups,
    H,
    W,
    x_b,
    x_c,
    x_h,
    x_w,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Mean and squared deviations of y in each block."""
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h, w = block_rows(W, BH, BW), block_columns(W, BW)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
    gate_h, gate_w = load_gates(gates, tile, c, h, w, n, H, W)
    y = block * gate_h[:, :, None] * gate_w[:, None, :]
    pixels = (h < H)[None, :, None] & (w < W)[None, None, :]
    count = tl.sum(tl.sum(tl.where(pixels, 1.0, 0.0), axis=2), axis=1)
    mean = tl.sum(tl.sum(y, axis=2), axis=1) / count
    y = tl.where(pixels, y - mean[:, None, None], 0.0)
    rest = tl.sum(tl.sum(y, axis=2), axis=1) / count
    squares = tl.sum(tl.sum(y * y, axis=2), axis=1) - count * rest * rest
    at = (tl.program_id(1) * tiles + tile) * n + c
    step = tl.num_programs(1) * tl.num_programs(0).to(tl.int64) * n
    tl.store(parts + at, mean, mask=c < n)
    tl.store(parts + step + at, rest, mask=c < n)
    tl.store(parts + 2 * step + at, squares, mask=c < n)


@triton.jit
def merge_statistics(
    parts,  # (3, blocks, B·G, n)
    vectors,  # (4, B·G, n): the first three are written
    blocks,
    tiles,
    H,
    W,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BB: tl.constexpr,
):
    """Mean, its rest and 1/std of each tile from those of its blocks. Grid (B·G, channel blocks).

    Chan et al., 1979: deviations within the blocks, plus deviations between their means.
    """
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    step = blocks * tl.num_programs(0).to(tl.int64) * n
    across = tl.cdiv(W, BW)
    mean = tl.zeros((BN,), tl.float32)
    for b0 in range(0, blocks, BB):
        b = b0 + tl.arange(0, BB)
        count = tl.minimum(BH, H - b // across * BH) * tl.minimum(BW, W - b % across * BW)
        at = (b.to(tl.int64)[:, None] * tiles + tile) * n + c[None, :]
        known = (b < blocks)[:, None] & (c < n)[None, :]
        weight = tl.where(b < blocks, count / (H * W), 0.0)[:, None]
        mean += tl.sum(weight * tl.load(parts + at, mask=known, other=0.0), axis=0)
    rest = tl.zeros((BN,), tl.float32)
    var = tl.zeros((BN,), tl.float32)
    for b0 in range(0, blocks, BB):
        b = b0 + tl.arange(0, BB)
        count = tl.minimum(BH, H - b // across * BH) * tl.minimum(BW, W - b % across * BW)
        at = (b.to(tl.int64)[:, None] * tiles + tile) * n + c[None, :]
        known = (b < blocks)[:, None] & (c < n)[None, :]
        weight = tl.where(b < blocks, count / (H * W), 0.0)[:, None]
        off = tl.load(parts + at, mask=known, other=0.0) - mean[None, :]
        off = tl.where(known, off, 0.0) + tl.load(parts + step + at, mask=known, other=0.0)
        squares = tl.load(parts + 2 * step + at, mask=known, other=0.0)
        rest += tl.sum(weight * off, axis=0)
        var += tl.sum(squares / (H * W) + weight * off * off, axis=0)
    r = tl.rsqrt(tl.maximum(var - rest * rest, 0.0) + EPS)
    at = vectors + tile * n + c
    tl.store(at, mean, mask=c < n)
    tl.store(at + tl.num_programs(0).to(tl.int64) * n, rest, mask=c < n)
    tl.store(at + 2 * tl.num_programs(0).to(tl.int64) * n, r, mask=c < n)


@triton.jit
def apply_gate(
    x,
    out,
    gates,  # (B·G, n, H + W)
    gate_map,  # (B·G, H, W): written
    vectors,  # (4, B·G, n)
    kernel,  # (9, n)
    gn_weight,
    gn_bias,
    tiles,
    groups,
    H,
    W,
    x_b,
    x_c,
    x_h,
    x_w,
    out_b,
    out_c,
    out_h,
    out_w,
    n: tl.constexpr,
    SAVE: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Gate a block of pixels, all channels. Grid (B·G, blocks)."""
    tile = tl.program_id(0).to(tl.int64)
    h, w = block_rows(W, BH, BW), block_columns(W, BW)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    out_start = tile_start(out, tl.program_id(0), groups, n, out_b, out_c)
    step = tl.num_programs(0).to(tl.int64) * n
    vectors_start = vectors + tile * n
    logits = tl.zeros((BH, BW), tl.float32)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        u = load_vector(vectors_start + 3 * step, c, n)
        r = load_vector(vectors_start + 2 * step, c, n)
        coef = u * load_vector(gn_weight, c, n) * r
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h, gate_w = load_gates(gates, tile, c, h, w, n, H, W)
        mean = load_vector(vectors_start, c, n)
        y = centred(block, gate_h, gate_w, mean, load_vector(vectors_start + step, c, n))
        logits += tl.sum(y * coef[:, None, None], axis=0)
        logits += tl.sum(u * load_vector(gn_bias, c, n), axis=0)
        for tap in tl.static_range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            near = load_block(start, c, h + dy, w + dx, n, H, W, x_c, x_h, x_w)
            taps = load_vector(kernel + tap * n, c, n)
            logits += tl.sum(near * taps[:, None, None], axis=0)
    gate = tl.sigmoid(logits)
    if SAVE:
        store_plane(gate_map + tile * H * W, gate, h, w, H, W)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        store_block(out_start, block * gate[None, :, :], c, h, w, n, H, W, out_c, out_h, out_w)


@triton.jit
def block_gradient_sums(
    x,
    gates,
    vectors,
    logit_gradient,  # dL, (B·G, H, W)
    parts,  # (blocks, B·G, 10, n): dk, then Σ dL·(y − μ)
    tiles,
    groups,
    H,
    W,
    x_b,
    x_c,
    x_h,
    x_w,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's share of dk and of Σ dL·(y − μ)."""
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h, w, t = block_rows(W, BH, BW), block_columns(W, BW), tl.arange(0, 16)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
    gate_h, gate_w = load_gates(gates, tile, c, h, w, n, H, W)
    step = tl.num_programs(0).to(tl.int64) * n
    mean = load_vector(vectors + tile * n, c, n)
    y = centred(block, gate_h, gate_w, mean, load_vector(vectors + step + tile * n, c, n))
    dl_start = logit_gradient + tile * H * W
    dl = load_plane(dl_start, h, w, H, W)
    y_dot = tl.sum(tl.sum(y * dl[None, :, :], axis=2), axis=1)
    dk = kernel_gradient(dl_start, block, h, w, t, H, W)
    found = tl.where((t == 9)[None, :], y_dot[:, None], dk)
    at = (tl.program_id(1) * tiles + tile) * 10 * n + t[None, :] * n + c[:, None]
    tl.store(parts + at, found, mask=(c < n)[:, None] & (t < 10)[None, :])


@triton.jit
def block_norm_gradient(
    block, gate_h, gate_w, vectors, logit_gradient, dl_means, slopes, gn_weight,
    tile, tiles, c, h, w, n, H, W,
):  # fmt: skip
    """Dy of a block, (BN, BH, BW)."""
    step = tl.num_programs(0).to(tl.int64) * n
    vectors_start = vectors + tile * n
    mean, rest = load_vector(vectors_start, c, n), load_vector(vectors_start + step, c, n)
    r = load_vector(vectors_start + 2 * step, c, n)
    coef = load_vector(vectors_start + 3 * step, c, n) * load_vector(gn_weight, c, n) * r
    y = centred(block, gate_h, gate_w, mean, rest)
    dl = load_plane(logit_gradient + tile * H * W, h, w, H, W)
    slope = load_vector(slopes + tile * n, c, n)
    return norm_gradient(y, dl, coef, slope, tl.load(dl_means + tile))


@triton.jit
def block_gate_gradients(
    x,
    gates,
    vectors,
    logit_gradient,  # (B·G, H, W)
    dl_means,  # (B·G,)
    slopes,  # (B·G, n): r·mean(dL·ŷ)
    gn_weight,
    rows,
    columns,
    tiles,
    groups,
    H,
    W,
    x_b,
    x_c,
    x_h,
    x_w,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Each block's sums of dy·x·s_w along W and dy·x·s_h along H, as in `store_line_sums`."""
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h, w = block_rows(W, BH, BW), block_columns(W, BW)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
    gate_h, gate_w = load_gates(gates, tile, c, h, w, n, H, W)
    dy = block_norm_gradient(
        block, gate_h, gate_w, vectors, logit_gradient, dl_means, slopes, gn_weight,
        tile, tiles, c, h, w, n, H, W,
    )  # fmt: skip
    product = dy * block
    along_w = tl.sum(product * gate_w[:, None, :], axis=2)
    along_h = tl.sum(product * gate_h[:, :, None], axis=1)
    store_line_sums(rows, columns, along_w, along_h, c, h, w, tiles, n, H, W, BW)


@triton.jit
def input_gradient(
    grad,
    x,
    dx,
    gates,
    gate_map,  # (B·G, H, W)
    vectors,
    logit_gradient,  # (B·G, H, W)
    dl_means,  # (B·G,)
    slopes,  # (B·G, n)
    gn_weight,
    kernel,  # (9, n)
    terms,  # (B·G, n, H + W): what reaches a pixel through its row and its column
    taps,  # (B·G, n, 9): what reaches a corner
    tiles,
    groups,
    H,
    W,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    x_b,
    x_c,
    x_h,
    x_w,
    dx_b,
    dx_c,
    dx_h,
    dx_w,
    n: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """The gradient of x in one block."""
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    h, w = block_rows(W, BH, BW), block_columns(W, BW)
    start = tile_start(x, tl.program_id(0), groups, n, x_b, x_c)
    grad_start = tile_start(grad, tl.program_id(0), groups, n, grad_b, grad_c)
    dx_start = tile_start(dx, tl.program_id(0), groups, n, dx_b, dx_c)
    block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
    lines = tile * n * (H + W)
    gate_h, gate_w = load_gates(gates, tile, c, h, w, n, H, W)
    dy = block_norm_gradient(
        block, gate_h, gate_w, vectors, logit_gradient, dl_means, slopes, gn_weight,
        tile, tiles, c, h, w, n, H, W,
    )  # fmt: skip
    found = dy * gate_h[:, :, None] * gate_w[:, None, :]
    found += spread(logit_gradient + tile * H * W, kernel, c, h, w, n, H, W)
    found += load_lines(terms + lines, c, h, n, H, H + W)[:, :, None]
    found += load_lines(terms + lines + H, c, w, n, W, H + W)[:, None, :]
    for corner in tl.static_range(4):
        # Tap 0 loses the last row and the last column, tap 2 the last row and the first column, ...
        at_row = h == (H - 1 if corner < 2 else 0)
        at_column = w == (W - 1 if corner % 2 == 0 else 0)
        here = at_row[None, :, None] & at_column[None, None, :]
        tap = (corner // 2) * 6 + (corner % 2) * 2
        value = tl.load(taps + (tile * n + c) * 9 + tap, mask=c < n, other=0.0)
        found += tl.where(here, value[:, None, None], 0.0)
    gate = load_plane(gate_map + tile * H * W, h, w, H, W)
    d = load_block(grad_start, c, h, w, n, H, W, grad_c, grad_h, grad_w)
    found += d * gate[None, :, :]
    store_block(dx_start, found, c, h, w, n, H, W, dx_c, dx_h, dx_w)
