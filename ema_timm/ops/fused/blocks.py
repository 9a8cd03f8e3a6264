"""What the Triton kernels of EMA attention are made of: functions on blocks, no kernel.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample,
(n, H, W). A block is (BN, BH, BW): channels, rows and columns, each a power of two. Maps come with
any strides; what the kernels pass to each other is contiguous float32. Identities a to d are those
of `ema_timm.ops.closed_form.formula`; tap (dy, dx) has index 3·(dy + 1) + dx + 1.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # that of `ema_timm.ops.weights`; kernels see constants of this file only


@triton.jit
def tile_start(pointer, tile, groups, n, stride_b, stride_c):
    """Where a tile begins in a map of any strides."""
    tile = tile.to(tl.int64)
    return pointer + (tile // groups) * stride_b + (tile % groups) * n * stride_c


@triton.jit
def aligned(number, VECTOR: tl.constexpr):
    """``number``, which is a multiple of VECTOR, in a form from which the compiler sees it."""
    return number // VECTOR * VECTOR


@triton.jit
def inside(c, h, w, n, H, W):
    """Which positions of a block lie in the tile."""
    rows = (h >= 0) & (h < H)
    cols = (w >= 0) & (w < W)
    return (c < n)[:, None, None] & rows[None, :, None] & cols[None, None, :]


@triton.jit
def places(c, h, w, stride_c, stride_h, stride_w):
    """Offsets of a block; 64 bits, because a stride can be anything."""
    c, h, w = c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (c * stride_c)[:, None, None] + (h * stride_h)[None, :, None] + (w * stride_w)


@triton.jit
def load_block(start, c, h, w, n, H, W, stride_c, stride_h, stride_w):
    """A block of a tile in float32, zero outside: (BN, BH, BW)."""
    at = places(c, h, w, stride_c, stride_h, stride_w)
    return tl.load(start + at, mask=inside(c, h, w, n, H, W), other=0.0).to(tl.float32)


@triton.jit
def store_block(start, block, c, h, w, n, H, W, stride_c, stride_h, stride_w):
    """Write what of a block lies in the tile, in the map's own type."""
    at = places(c, h, w, stride_c, stride_h, stride_w)
    tl.store(start + at, block.to(start.dtype.element_ty), mask=inside(c, h, w, n, H, W))


@triton.jit
def load_plane(start, h, w, H, W):
    """Rows of a contiguous float32 map (H, W), zero outside: (BH, BW)."""
    at = h[:, None] * W + w[None, :]
    rows = ((h >= 0) & (h < H))[:, None]
    return tl.load(start + at, mask=rows & ((w >= 0) & (w < W))[None, :], other=0.0)


@triton.jit
def load_lines(pointer, c, p, n, P, stride):
    """Numbers along rows or columns of each channel, zero outside: (BN, BP)."""
    at = c.to(tl.int64)[:, None] * stride + p[None, :]
    return tl.load(pointer + at, mask=(c < n)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def store_lines(pointer, lines, c, p, n, P, stride):
    """Write what `load_lines` reads."""
    at = c.to(tl.int64)[:, None] * stride + p[None, :]
    tl.store(pointer + at, lines, mask=(c < n)[:, None] & (p < P)[None, :])


@triton.jit
def load_gates(gates, tile, c, h, w, n, H, W):
    """Gates along H and W out of (B·G, n, H + W): (BN, BH) and (BN, BW)."""
    start = gates + tile * n * (H + W)
    gate_h = load_lines(start, c, h, n, H, H + W)
    return gate_h, load_lines(start + H, c, w, n, W, H + W)


@triton.jit
def store_plane(start, plane, h, w, H, W):
    """Write rows of a contiguous float32 map (H, W)."""
    at = h[:, None] * W + w[None, :]
    tl.store(start + at, plane, mask=(h < H)[:, None] & (w < W)[None, :])


@triton.jit
def centred(block, gate_h, gate_w, mean, rest):
    """Y − μ, (BN, BH, BW), from gates (BN, BH) and (BN, BW)."""
    y = block * gate_h[:, :, None] * gate_w[:, None, :]
    return (y - mean[:, None, None]) - rest[:, None, None]


@triton.jit
def norm_gradient(y, dl, coef, slope, dl_mean):
    """Dy = uγr·(dL − mean dL − ŷ·mean(dL·ŷ)), (BN, BH, BW), from y − μ and dL (BH, BW)."""
    return coef[:, None, None] * ((dl - dl_mean)[None, :, :] - y * slope[:, None, None])


@triton.jit
def spread(dl_start, kernel, c, h, w, n, H, W):
    """The transposed convolution of dL with the collapsed kernel, (BN, BH, BW)."""
    found = tl.zeros((c.shape[0], h.shape[0], w.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        seen = load_plane(dl_start, h - (tap // 3 - 1), w - (tap % 3 - 1), H, W)
        found += load_vector(kernel + tap * n, c, n)[:, None, None] * seen[None, :, :]
    return found


@triton.jit
def kernel_gradient(dl_start, block, h, w, t, H, W):
    """A block's share of dk, (BN, 16): what each tap saw of x, weighed by dL."""
    dk = tl.zeros((block.shape[0], 16), tl.float32)
    for tap in tl.static_range(9):
        seen = load_plane(dl_start, h - (tap // 3 - 1), w - (tap % 3 - 1), H, W)
        share = tl.sum(tl.sum(block * seen[None, :, :], axis=2), axis=1)
        dk += tl.where(t[None, :] == tap, share[:, None], 0.0)
    return dk


@triton.jit
def load_vector(pointer, c, n):
    """One number a channel, zero beyond n: (BN,)."""
    return tl.load(pointer + c, mask=c < n, other=0.0)


@triton.jit
def load_matrix(pointer, c, n, stride_o, stride_i):
    """A matrix over output and input channels, zero beyond n: (BN, BN)."""
    at = c[:, None] * stride_o + c[None, :] * stride_i
    return tl.load(pointer + at, mask=(c < n)[:, None] & (c < n)[None, :], other=0.0)


@triton.jit
def mix(weight, bias, pooled):
    """Gates of pooled rows or columns (BN, P): the shared 1×1 convolution and its sigmoid."""
    mixed = tl.sum(weight[:, :, None] * pooled[None, :, :], axis=1)
    return tl.sigmoid(mixed + bias[:, None])


@triton.jit
def pick(matrix, t, index):
    """Column ``index`` of (BN, 16)."""
    return tl.sum(tl.where(t[None, :] == index, matrix, 0.0), axis=1)


@triton.jit
def pick_corner(row, w, index):
    """One pixel a channel out of a row of pixels (BN, BW)."""
    return tl.sum(tl.where(w[None, :] == index, row, 0.0), axis=1)


@triton.jit
def shifted_means(start, col_sum, c, w, t, n, H, W, stride_c, stride_h, stride_w):
    """Identity c: what each tap of a zero-padded 3×3 kernel sees in the mean, (BN, 16).

    From column sums (BN, BW), which hold the whole width, and the border rows of the tile.
    """
    edge = tl.arange(0, 1)
    first = load_block(start, c, edge, w, n, H, W, stride_c, stride_h, stride_w)
    last = load_block(start, c, edge + H - 1, w, n, H, W, stride_c, stride_h, stride_w)
    first_row, last_row = tl.sum(first, axis=1), tl.sum(last, axis=1)
    first_col, last_col = pick_corner(col_sum, w, 0), pick_corner(col_sum, w, W - 1)
    dy = (t // 3 - 1)[None, :]
    dx = (t % 3 - 1)[None, :]
    sums = tl.sum(col_sum, axis=1)[:, None] + tl.zeros_like(t)[None, :].to(tl.float32)
    sums -= tl.where(dy < 0, tl.sum(last_row, axis=1)[:, None], 0.0)
    sums -= tl.where(dy == 1, tl.sum(first_row, axis=1)[:, None], 0.0)
    sums -= tl.where(dx < 0, last_col[:, None], 0.0)
    sums -= tl.where(dx > 0, first_col[:, None], 0.0)
    sums += tl.where((dy < 0) & (dx < 0), pick_corner(last_row, w, W - 1)[:, None], 0.0)
    sums += tl.where((dy < 0) & (dx > 0), pick_corner(last_row, w, 0)[:, None], 0.0)
    sums += tl.where((dy == 1) & (dx < 0), pick_corner(first_row, w, W - 1)[:, None], 0.0)
    sums += tl.where((dy == 1) & (dx > 0), pick_corner(first_row, w, 0)[:, None], 0.0)
    return tl.where(t[None, :] < 9, sums / (H * W), 0.0)


@triton.jit
def vote(means, weight, bias, c, t, n: tl.constexpr, DROPPED: tl.constexpr):
    """The softmax weights u of the local branch, (BN,), from shifted means (BN, 16).

    ``weight`` is (n - DROPPED, n, 9): with one row dropped, channel 0 votes 0.
    """
    voter = (c >= DROPPED) & (c < n)
    logits = tl.load(bias + c - DROPPED, mask=voter, other=0.0)
    at = (c[:, None] - DROPPED) * (9 * n) + c[None, :] * 9
    for tap in tl.static_range(9):
        row = tl.load(weight + at + tap, mask=voter[:, None] & (c < n)[None, :], other=0.0)
        logits += tl.sum(row * pick(means, t, tap)[None, :], axis=1)
    logits = tl.where(c < n, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return weights / tl.sum(weights, axis=0)


@triton.jit
def shift_columns(plane, w, BY: tl.constexpr, BW: tl.constexpr):
    """``plane`` (BH, BW) read at column w + BY, zero outside the block; BY is -1 or 1."""
    source = w + BY
    at = tl.minimum(tl.maximum(source, 0), BW - 1)
    moved = tl.gather(plane, tl.broadcast_to(at[None, :], plane.shape), axis=1)
    return tl.where(((source >= 0) & (source < BW))[None, :], moved, 0.0)
