"""Triton kernels of EMA attention: one program takes one tile from the first pass to the last.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample,
(n, H, W). Blocks are (BN, BH, BW): all channels of the tile, BH rows, the whole width, each
rounded up to a power of two; a tile is walked in steps of BH rows. Only the first walk reads the
tile from memory, the later ones find it in cache. Accumulators are float32.

Nothing here is shared between programs: every output number is written by one program, once.
`ema_timm.ops.fused.split_tile` has the kernels for tiles that do not suit one program.
"""

import triton
import triton.language as tl

from ema_timm.ops.fused.blocks import (
    EPS,
    aligned,
    centred,
    inside,
    kernel_gradient,
    load_block,
    load_lines,
    load_matrix,
    load_plane,
    load_vector,
    mix,
    norm_gradient,
    pick,
    shift_columns,
    shifted_means,
    spread,
    store_block,
    store_lines,
    store_plane,
    tile_start,
    vote,
)


@triton.jit
def forward_tile(
    x,
    out,
    gates,  # (B·G, n, H + W): saved
    gate_map,  # (B·G, H, W): saved
    vectors,  # (4, B·G, n): mean of y, what its rounding leaves, 1/std of y, u; saved
    mix_weight,  # (n, n)
    mix_bias,  # (n,)
    kernel,  # (9, n)
    vote_weight,  # (n - DROPPED, n, 9)
    vote_bias,  # (n - DROPPED,)
    gn_weight,  # (n,)
    gn_bias,  # (n,)
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
    DROPPED: tl.constexpr,
    SAVE: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """The whole forward of one tile: pool, vote and centre, gate. Grid (B·G,)."""
    x_b, x_h = aligned(x_b, VECTOR), aligned(x_h, VECTOR)
    out_b, out_h = aligned(out_b, VECTOR), aligned(out_h, VECTOR)
    if LAST:
        x_w, out_w = aligned(x_w, VECTOR), aligned(out_w, VECTOR)
    else:
        x_c, out_c, W = aligned(x_c, VECTOR), aligned(out_c, VECTOR), aligned(W, VECTOR)
    tile = tl.program_id(0)
    c, w, t = tl.arange(0, BN), tl.arange(0, BW), tl.arange(0, 16)
    start = tile_start(x, tile, groups, n, x_b, x_c)
    out_start = tile_start(out, tile, groups, n, out_b, out_c)
    w1, b1 = load_matrix(mix_weight, c, n, n, 1), load_vector(mix_bias, c, n)

    # Pool: column sums of the tile; a row is whole within one step, so its mean needs no memory.
    col_sum = tl.zeros((BN, BW), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        col_sum += tl.sum(load_block(start, c, h, w, n, H, W, x_c, x_h, x_w), axis=1)
    gate_w = mix(w1, b1, col_sum / H)
    means = shifted_means(start, col_sum, c, w, t, n, H, W, x_c, x_h, x_w)
    u = vote(means, vote_weight, vote_bias, c, t, n, DROPPED)

    # Statistics of y, shifted by the mean of the first step: the whole mean lies within
    # sqrt(H / BH) standard deviations of it, so the difference of squares cancels no more.
    shift = tl.zeros((BN,), tl.float32)
    rest = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h = mix(w1, b1, tl.sum(block, axis=2) / W)
        y = block * gate_h[:, :, None] * gate_w[:, None, :]
        if h0 == 0:
            shift = tl.sum(tl.sum(y, axis=2), axis=1) / (tl.minimum(BH, H) * W)
        y = tl.where(inside(c, h, w, n, H, W), y - shift[:, None, None], 0.0)
        rest += tl.sum(tl.sum(y, axis=2), axis=1)
        squares += tl.sum(tl.sum(y * y, axis=2), axis=1)
    rest = rest / (H * W)
    r = tl.rsqrt(tl.maximum(squares / (H * W) - rest * rest, 0.0) + EPS)

    # Gate: the norm and the collapsed convolution meet in one map L.
    coef = u * load_vector(gn_weight, c, n) * r
    constant = tl.sum(u * load_vector(gn_bias, c, n), axis=0)
    gates_start = gates + tile.to(tl.int64) * n * (H + W)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h = mix(w1, b1, tl.sum(block, axis=2) / W)
        y = centred(block, gate_h, gate_w, shift, rest)
        logits = tl.sum(y * coef[:, None, None], axis=0) + constant
        left = tl.zeros((BH, BW), tl.float32)
        right = tl.zeros((BH, BW), tl.float32)
        for dy in tl.static_range(-1, 2):
            near = block
            if dy != 0:
                near = load_block(start, c, h + dy, w, n, H, W, x_c, x_h, x_w)
            taps = kernel + 3 * (dy + 1) * n
            left += tl.sum(near * load_vector(taps, c, n)[:, None, None], axis=0)
            logits += tl.sum(near * load_vector(taps + n, c, n)[:, None, None], axis=0)
            right += tl.sum(near * load_vector(taps + 2 * n, c, n)[:, None, None], axis=0)
        # Channels are summed before columns are shifted, so a shift moves one map, not n.
        logits += shift_columns(left, w, -1, BW) + shift_columns(right, w, 1, BW)
        gate = tl.sigmoid(logits)
        store_block(out_start, block * gate[None, :, :], c, h, w, n, H, W, out_c, out_h, out_w)
        if SAVE:
            store_plane(gate_map + tile.to(tl.int64) * H * W, gate, h, w, H, W)
            store_lines(gates_start, gate_h, c, h, n, H, H + W)
    if SAVE:
        store_lines(gates_start + H, gate_w, c, w, n, W, H + W)
        at = vectors + tile.to(tl.int64) * n + c
        step = tl.num_programs(0).to(tl.int64) * n
        tl.store(at, shift, mask=c < n)
        tl.store(at + step, rest, mask=c < n)
        tl.store(at + 2 * step, r, mask=c < n)
        tl.store(at + 3 * step, u, mask=c < n)


@triton.jit
def gate_gradient(
    grad,
    x,
    gate_map,  # (B·G, H, W)
    logit_gradient,  # (B·G, H, W): written
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
    n: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """DL = (Σ_c D·x)·A·(1 − A), a block of pixels each. Grid (B·G, row blocks, column blocks)."""
    grad_b, grad_h = aligned(grad_b, VECTOR), aligned(grad_h, VECTOR)
    x_b, x_h = aligned(x_b, VECTOR), aligned(x_h, VECTOR)
    if LAST:
        grad_w, x_w = aligned(grad_w, VECTOR), aligned(x_w, VECTOR)
    else:
        grad_c, x_c, W = aligned(grad_c, VECTOR), aligned(x_c, VECTOR), aligned(W, VECTOR)
    tile = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    w = tl.program_id(2) * BW + tl.arange(0, BW)
    grad_start = tile_start(grad, tile, groups, n, grad_b, grad_c)
    start = tile_start(x, tile, groups, n, x_b, x_c)
    total = tl.zeros((BH, BW), tl.float32)
    for c0 in range(0, n, BN):
        c = c0 + tl.arange(0, BN)
        d = load_block(grad_start, c, h, w, n, H, W, grad_c, grad_h, grad_w)
        total += tl.sum(d * load_block(start, c, h, w, n, H, W, x_c, x_h, x_w), axis=0)
    start_of_plane = tile.to(tl.int64) * H * W
    gate = load_plane(gate_map + start_of_plane, h, w, H, W)
    gradient = total * gate * (1 - gate)
    store_plane(logit_gradient + start_of_plane, gradient, h, w, H, W)


@triton.jit
def backward_tile(
    grad,
    x,
    dx,
    gates,  # (B·G, n, H + W)
    gate_map,  # (B·G, H, W)
    vectors,  # (4, B·G, n)
    logit_gradient,  # dL, (B·G, H, W)
    mix_weight,
    kernel,
    vote_weight,  # (n, n, 9)
    gn_weight,
    gn_bias,
    parts,  # (B·G, 13 n + n² + 1): dk (9, n), dm, dγ, dβ, db₁, dW₁ (n, n), ΣdL
    means,  # (B·G, n, 9): shifted means
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
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Everything behind dL for one tile: its dx and its share of the parameters' gradients.

    Grid (B·G,).
    """
    grad_b, grad_h = aligned(grad_b, VECTOR), aligned(grad_h, VECTOR)
    x_b, x_h = aligned(x_b, VECTOR), aligned(x_h, VECTOR)
    dx_b, dx_h = aligned(dx_b, VECTOR), aligned(dx_h, VECTOR)
    if LAST:
        grad_w, x_w, dx_w = aligned(grad_w, VECTOR), aligned(x_w, VECTOR), aligned(dx_w, VECTOR)
    else:
        grad_c, x_c, dx_c = aligned(grad_c, VECTOR), aligned(x_c, VECTOR), aligned(dx_c, VECTOR)
        W = aligned(W, VECTOR)
    tile = tl.program_id(0)
    c, w, t = tl.arange(0, BN), tl.arange(0, BW), tl.arange(0, 16)
    grad_start = tile_start(grad, tile, groups, n, grad_b, grad_c)
    start = tile_start(x, tile, groups, n, x_b, x_c)
    dx_start = tile_start(dx, tile, groups, n, dx_b, dx_c)
    tile = tile.to(tl.int64)
    gates_start = gates + tile * n * (H + W)
    dl_start = logit_gradient + tile * H * W
    gate_w = load_lines(gates_start + H, c, w, n, W, H + W)
    step = tl.num_programs(0).to(tl.int64) * n
    mean = load_vector(vectors + tile * n, c, n)
    rest = load_vector(vectors + step + tile * n, c, n)
    r = load_vector(vectors + 2 * step + tile * n, c, n)
    u = load_vector(vectors + 3 * step + tile * n, c, n)

    # What the statistics and the collapsed kernel need: ΣdL, Σ dL·ŷ and dk.
    col_sum = tl.zeros((BN, BW), tl.float32)
    dk = tl.zeros((BN, 16), tl.float32)
    y_dot = tl.zeros((BN,), tl.float32)
    dl_sum = 0.0
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h = load_lines(gates_start, c, h, n, H, H + W)
        dl = load_plane(dl_start, h, w, H, W)
        y = centred(block, gate_h, gate_w, mean, rest)
        y_dot += tl.sum(tl.sum(y * dl[None, :, :], axis=2), axis=1)
        dl_sum += tl.sum(tl.sum(dl, axis=1), axis=0)
        col_sum += tl.sum(block, axis=1)
        dk += kernel_gradient(dl_start, block, h, w, t, H, W)
    y_dot = y_dot * r
    gamma = load_vector(gn_weight, c, n)
    coef = u * gamma * r
    dl_mean = dl_sum / (H * W)
    slope = r * y_dot / (H * W)

    # Votes: dm, and what reaches x through the shifted means.
    du = gamma * y_dot + load_vector(gn_bias, c, n) * dl_sum
    dm = u * (du - tl.sum(u * du, axis=0))
    taps = tl.zeros((BN, 16), tl.float32)
    for tap in tl.static_range(9):
        votes = load_matrix(vote_weight + tap, c, n, 9 * n, 9)
        back = tl.sum(votes * dm[:, None], axis=0) / (H * W)
        taps += tl.where(t[None, :] == tap, back[:, None], 0.0)

    # Gates along W.
    dq = tl.zeros((BN, BW), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h = load_lines(gates_start, c, h, n, H, H + W)
        dl = load_plane(dl_start, h, w, H, W)
        y = centred(block, gate_h, gate_w, mean, rest)
        dy = norm_gradient(y, dl, coef, slope, dl_mean)
        dq += tl.sum(dy * block * gate_h[:, :, None], axis=1)
    dq = dq * gate_w * (1 - gate_w)
    w1 = load_matrix(mix_weight, c, n, n, 1)
    db1 = tl.sum(dq, axis=1)
    dw1 = tl.sum(dq[:, None, :] * (col_sum / H)[None, :, :], axis=2)
    col_term = tl.sum(w1[:, :, None] * dq[:, None, :], axis=0) / H
    dy_of, dx_of = (t // 3 - 1)[None, :], (t % 3 - 1)[None, :]
    lost_left = tl.sum(tl.where((dx_of > 0) & (t < 9)[None, :], taps, 0.0), axis=1)
    lost_right = tl.sum(tl.where(dx_of < 0, taps, 0.0), axis=1)
    col_term -= tl.where((w == 0)[None, :], lost_left[:, None], 0.0)
    col_term -= tl.where((w == W - 1)[None, :], lost_right[:, None], 0.0)
    lost_top = tl.sum(tl.where(dy_of == 1, taps, 0.0), axis=1)
    lost_bottom = tl.sum(tl.where(dy_of < 0, taps, 0.0), axis=1)
    everywhere = tl.sum(taps, axis=1)
    top = tl.where((w == 0)[None, :], pick(taps, t, 8)[:, None], 0.0)
    top += tl.where((w == W - 1)[None, :], pick(taps, t, 6)[:, None], 0.0)
    bottom = tl.where((w == 0)[None, :], pick(taps, t, 2)[:, None], 0.0)
    bottom += tl.where((w == W - 1)[None, :], pick(taps, t, 0)[:, None], 0.0)

    # Gates along H, and dx.
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        block = load_block(start, c, h, w, n, H, W, x_c, x_h, x_w)
        gate_h = load_lines(gates_start, c, h, n, H, H + W)
        dl = load_plane(dl_start, h, w, H, W)
        y = centred(block, gate_h, gate_w, mean, rest)
        dy = norm_gradient(y, dl, coef, slope, dl_mean)
        dy = dy * gate_w[:, None, :]
        dp = tl.sum(dy * block, axis=2) * gate_h * (1 - gate_h)
        db1 += tl.sum(dp, axis=1)
        pooled = tl.sum(block, axis=2) / W
        dw1 += tl.sum(dp[:, None, :] * pooled[None, :, :], axis=2)
        row_term = tl.sum(w1[:, :, None] * dp[:, None, :], axis=0) / W + everywhere[:, None]
        row_term -= tl.where((h == 0)[None, :], lost_top[:, None], 0.0)
        row_term -= tl.where((h == H - 1)[None, :], lost_bottom[:, None], 0.0)
        found = dy * gate_h[:, :, None] + row_term[:, :, None] + col_term[:, None, :]
        found += tl.where((h == 0)[None, :, None], top[:, None, :], 0.0)
        found += tl.where((h == H - 1)[None, :, None], bottom[:, None, :], 0.0)
        found += spread(dl_start, kernel, c, h, w, n, H, W)
        gate = load_plane(gate_map + tile * H * W, h, w, H, W)
        d = load_block(grad_start, c, h, w, n, H, W, grad_c, grad_h, grad_w)
        found += d * gate[None, :, :]
        store_block(dx_start, found, c, h, w, n, H, W, dx_c, dx_h, dx_w)

    share_of_tile = parts + tile * (13 * n + n * n + 1)
    at = t[None, :] * n + c[:, None]
    tl.store(share_of_tile + at, dk, mask=(c < n)[:, None] & (t < 9)[None, :])
    share_of_tile += 9 * n
    tl.store(share_of_tile + c, dm, mask=c < n)
    tl.store(share_of_tile + n + c, u * y_dot, mask=c < n)
    tl.store(share_of_tile + 2 * n + c, u * dl_sum, mask=c < n)
    tl.store(share_of_tile + 3 * n + c, db1, mask=c < n)
    store_lines(share_of_tile + 4 * n, dw1, c, c, n, n, n)
    tl.store(share_of_tile + 4 * n + n * n, dl_sum)

    seen_means = shifted_means(start, col_sum, c, w, t, n, H, W, x_c, x_h, x_w)
    store_lines(means + tile * n * 9, seen_means, c, t, n, 9, 9)
