"""The backward of `passes`, step by step in the order of the derivation.

B batch, G groups, n channels of a group, H height, W width, N = H·W; D is the gradient of the
output, y = s_h·s_w·g, ŷ = (y − mean)·r and dev = mean − s_h·κ, so that ŷ = −r·(dev + s_h·e).
Sums over a map are computed as means, because float16 can hold what one pixel receives, which is
of the size of the pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.gpu.steps import (
    PassesSaved,
    Rows,
    convolve,
    ends,
    gated_rows,
    images,
    pool,
    scale,
    split,
)
from ema_timm.ops.saved import finish_weights
from ema_timm.ops.weights import EPS, EmaWeights, FoldedWeights

PIECES = 128
"""Most pieces of a sum over rows and columns, each a separate product of matrices."""


class _Logits(NamedTuple):
    """The gradient of the gate's logits, and the terms of it that the norm needs.

    Attributes:
        map: dL, (B, G, H, W).
        mean: Its mean over N, (B, G, 1, 1).
        centred: dL − its mean, (B, G, H, W).
        dev: mean − s_h·κ, (B, G, n, H).
        product: The mean over N of −dL·ŷ, (B, G, n).
        slope: The same times r, (B, G, n).
        dm: The gradient of the logits of u over N, (B, G, n).
    """

    map: Tensor
    mean: Tensor
    centred: Tensor
    dev: Tensor
    product: Tensor
    slope: Tensor
    dm: Tensor


def backward(
    grad: Tensor,
    x: Tensor,
    saved: PassesSaved,
    weights: EmaWeights,
    groups: int,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, EmaWeights | None]:
    """`ema_timm.ops.cpu.chunks.backward`: (B, C, H, W) in and out."""
    g, d = split(x, groups), split(grad, groups)
    pooled = saved.pooled if saved.pooled.numel() else pool(g, weights.gn_weight.dtype)
    rows = gated_rows(g, pooled, weights.conv1x1_weight, weights.conv1x1_bias)
    buffer = torch.empty_like(g)

    logits = _logits_gradient(g, d, rows, saved, weights, buffer)
    dy = _gated_gradient(rows, logits, saved.coef)  # takes the deviations
    torch.mul(dy, g, out=buffer)
    dmix = _mix_gradient(buffer, rows.gates, logits.slope, saved.coef)
    del buffer
    dx, dtaps = _convolution_gradients(x, logits.map, saved.taps, need_x, need_weights)
    if need_x:
        torch.sub(split(dx, groups), dy, out=dy)
        dx = _add_to_input(dy, d, saved.gate_map, logits.dm, dmix, weights).flatten(1, 2)
    if not need_weights:
        return dx, None
    found, total = _parameters(saved, pooled, logits, dmix, dtaps, x)
    return dx, finish_weights(found, total, weights)


def _logits_gradient(
    g: Tensor, d: Tensor, rows: Rows, saved: PassesSaved, w: EmaWeights, buffer: Tensor
) -> _Logits:
    """Through the gate to the logits of u and to the terms of the norm; fills ``buffer``."""
    dtype = w.gn_weight.dtype
    dgate = torch.mul(d, g, out=buffer).sum(2)
    # Not sigmoid_backward: on CUDA it computes in the type of its output.
    gate = saved.gate_map
    dlogits = torch.addcmul(gate, gate, gate, value=-1, out=torch.empty_like(dgate)).mul_(dgate)
    average = dlogits.mean((2, 3), keepdim=True, dtype=dtype)
    # The norm's backward subtracts the mean. Subtract it first, before 1/std magnifies rounding.
    centred = torch.sub(dlogits, average, out=torch.empty_like(dlogits))
    row = centred.mean(3, dtype=dtype)  # (B, G, H)
    torch.mul(rows.deviation, centred[:, :, None], out=buffer)
    dev = torch.addcmul(saved.mean[..., None], rows.gate_h, rows.shift, value=-1)
    product = (dev * row[:, :, None]).addcmul_(rows.gate_h, buffer.mean(4, dtype=dtype))
    product = product.mean(3).mul_(saved.r)
    # The constant v·b₃ of the logits does not tell channels apart: the softmax takes it off.
    du = torch.addcmul(average[..., 0] * w.gn_bias, w.gn_weight, product, value=-1)
    dm = torch._softmax_backward_data(du, saved.u, -1, dtype)
    return _Logits(dlogits, average, centred, dev, product, product * saved.r, dm)


def _gated_gradient(rows: Rows, logits: _Logits, coef: Tensor) -> Tensor:
    """Minus the gradient of y times s_h·s_w, (B, G, n, H, W), in place of the deviations."""
    e, gate_h = rows.deviation, rows.gate_h
    # −dy/(scale·coef) = slope·(dev + s_h·e) − (dL − its mean), which is of the size of dL whatever
    # 1/std may be: float16 holds it. Times s_h; then times scale·coef·s_w.
    gated = logits.slope[..., None] * gate_h
    constant = gated * logits.dev
    torch.addcmul(constant[..., None], gated.mul_(gate_h)[..., None], e, out=e)
    torch.addcmul(e, gate_h[..., None], logits.centred[:, :, None], value=-1, out=e)
    gated = coef[..., None] * rows.gate_w
    if scale(e) != 1:
        gated.mul_(scale(e))
    return torch.mul(e, gated[..., None, :], out=e)


def _mix_gradient(product: Tensor, gates: Tensor, slope: Tensor, coef: Tensor) -> Tensor:
    """From −dy·y to minus the gradient of the mixed pools, (B, G, n, H + W), for every pixel.

    The mean of the product is known: dy is orthogonal to 1 and, but for eps, to ŷ. What rounding
    adds to it would all go to the bias of the mixing, in whose gradient rows cancel.
    """
    height, dtype = product.shape[3], gates.dtype
    gates = gates[..., :-1]
    means = gates.new_empty(gates.shape)
    torch.mean(product, 4, dtype=dtype, out=means[..., :height])
    torch.mean(product, 3, dtype=dtype, out=means[..., height:])
    excess = means[..., :height].mean(3)
    excess.addcmul_(slope, coef, value=-EPS * scale(product) ** 2)
    means.sub_(excess[..., None])
    return means.addcmul_(means, gates, value=-1)


def _convolution_gradients(
    x: Tensor, dlogits: Tensor, taps: Tensor, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Through conv(g; k): to the input, (B, C, H, W), and to k, (9, n)."""
    n, one, dtype = taps.shape[0], [1, 1], torch.promote_types(x.dtype, torch.float32)
    seen, repeats = images(x, dlogits.shape[1])
    taps = taps.view(1, n, 3, 3).expand(repeats, -1, -1, -1)
    grad = dlogits.to(x.dtype).view(-1, repeats, *x.shape[2:])
    if x.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous(memory_format=torch.channels_last)
    dx = dtaps = None
    if x.dtype != dtype:
        dx, dtaps, _ = torch.ops.aten.convolution_backward(
            grad, seen, taps, None, one, one, one, False, [0, 0], repeats,
            [need_x, need_weights, False],
        )  # fmt: skip
    else:
        if need_x:
            dx = convolve(grad, taps, padding=1, transposed=True, groups=repeats)
        if need_weights:
            dtaps = _depthwise_gradient(x, dlogits, n)
    if need_weights:
        dtaps = dtaps.view(-1, n, 9).sum(0, dtype=dtype).t()
    return dx.view(x.shape) if need_x else None, dtaps


def _depthwise_gradient(x: Tensor, dlogits: Tensor, n: int) -> Tensor:
    """The gradient of k of every channel by itself, (C, 1, 3, 3).

    The backward of a convolution over channels rounds float32 to TF32 unless a global setting of
    PyTorch forbids it. That of single channels has no product of matrices, and so no rounding.
    """
    one = [1, 1]
    grad = torch.empty_like(x)
    split(grad, dlogits.shape[1]).copy_(dlogits[:, :, None])
    weight = x.new_empty((x.shape[1], 1, 3, 3))
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, one, one, one, False, [0, 0], x.shape[1], [False, True, False]
    )[1]


def _add_to_input(
    dx: Tensor, d: Tensor, gate_map: Tensor, dm: Tensor, dmix: Tensor, w: EmaWeights
) -> Tensor:
    """Add D·A and what the pools receive to ``dx``; it and D are (B, G, n, H, W)."""
    n, height = dx.shape[2:4]
    mixing = w.conv1x1_weight.reshape(n, n, 1)
    dpool = convolve(dmix.flatten(0, 1), mixing, transposed=True).view_as(dmix)
    # In the order of `shifted_means_reversed`.
    taps = w.conv3x3_weight.reshape(n, n, 9).flip(2)
    dtaps = convolve(dm.view(-1, n, 1), taps, transposed=True).view(*dm.shape, 3, 3)
    row, col = dpool[..., :height], dpool[..., height:]  # minus what each pixel receives
    row.sub_(dtaps.sum((3, 4))[..., None])
    for pools, borders in ((row, dtaps.sum(4)), (col, dtaps.sum(3))):
        seen = ends(pools, -1)
        seen.add_(_meeting(borders[..., ::2], seen, -1))
    corners = ends(ends(dx, -1), -2)
    corners.add_(_meeting(_meeting(dtaps[..., ::2, ::2], corners, -1), corners, -2))
    torch.addcmul(dx, d, gate_map[:, :, None], out=dx)
    torch.sub(dx, row[..., None], out=dx)
    return torch.sub(dx, col[..., None, :], out=dx)


def _meeting(borders: Tensor, seen: Tensor, dim: int) -> Tensor:
    """What `ends` of a map receive from both its ``borders``: their sum where they meet."""
    return borders if seen.shape[dim] == 2 else borders.sum(dim, keepdim=True)


def _parameters(
    saved: PassesSaved,
    pooled: Tensor,
    logits: _Logits,
    dmix: Tensor,
    dtaps: Tensor,
    x: Tensor,
) -> tuple[FoldedWeights, Tensor]:
    """Gradients of the folded parameters, and the sum of dL, (1,); takes ``dmix``."""
    n, (height, width) = dmix.shape[2], x.shape[2:]
    dtype, u = dmix.dtype, saved.u
    # Never rounded to TF32; dm is below the range of float16.
    exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float64
    # A pixel's share times the pixels: of a row, of a column. Where they are as many, at the end.
    pixels = width if height == width else 1
    if height != width:
        torch._foreach_mul_([dmix[..., :height], dmix[..., height:]], [width, height])
    dm = logits.dm.view(-1, n)
    through_u = torch.matmul(dm.to(exact).t(), saved.means.to(exact)).to(dtype)
    sums = [
        _products(dmix, pooled[..., :-1], x.dtype),
        dmix.sum((0, 1, 3)),
        through_u.view(n, n, 9).flip(2).view(n, 9 * n),
        dm.sum(0),
        (u * logits.product).sum((0, 1)),
        torch.mv(u.view(-1, n).t(), logits.mean.flatten()),
        logits.mean.sum((0, 1))[0],
    ]
    area = height * width
    torch._foreach_mul_(sums, [-pixels, -pixels, area, area, -area, area, area])
    mix, mix_bias, *norm, total = sums
    return FoldedWeights(mix, mix_bias, dtaps, *norm), total


def _products(dmix: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ ``dmix``·``pooled`` over lines and tiles, (n, n), from (B, G, n, H + W) each.

    In the type of the map, or in float64, which is never rounded to TF32, for float32.
    """
    exact = torch.float64 if dtype == torch.float32 else dtype
    factors = []
    for lines in (dmix, pooled):
        batch, groups, n, length = lines.shape
        # All lines of a channel in a row, cut in pieces: products as many as a GPU can run at once.
        pieces = math.gcd(batch * groups, PIECES)
        rows = torch.empty((n, batch * groups, length), dtype=exact, device=lines.device)
        rows.copy_(lines.flatten(0, 1).transpose(0, 1))
        factors.append(rows.view(n, pieces, -1).transpose(0, 1))
    return torch.matmul(factors[0], factors[1].mT).sum(0, dtype=dmix.dtype)
