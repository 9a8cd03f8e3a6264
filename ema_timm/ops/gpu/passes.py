"""The closed form in few passes of PyTorch's operators over the whole map, written for GPUs.

Same identities as `ema_timm.ops.formula`. A GPU has no cache that would hold a chunk of tiles, so
the cost is how often the map is read and written. Between two passes a map has the type of the
input and is overwritten in place. The factors that are broadcast onto it, and every sum, have the
type of the statistics. Nothing depends on strides: every memory format works without a copy.

In half precision the map y = g·s_h·s_w would lose its variation if its mean is large. The passes
therefore store e = scale·(κ − g·s_w), where κ is the mean of a row times the gate of the whole
mean: rounding is then relative to a deviation. scale, 1/2 for float16, keeps e in range; y is
scaled likewise.

Small matrix products are convolutions with TF32 switched off, whatever PyTorch's settings allow
elsewhere. B batch, G groups, n channels of a group, H height, W width.
The forward is here, the backward in `passes_backward`, what both need in `steps`.
"""

import torch
from torch import Tensor

from ema_timm.ops.gpu.passes_backward import backward
from ema_timm.ops.gpu.steps import (
    PassesSaved,
    Rows,
    convolve,
    gated_rows,
    images,
    pool,
    scale,
    shifted_means_reversed,
    split,
)
from ema_timm.ops.gpu.steps import fold_in_few_operators as fold
from ema_timm.ops.weights import EPS, FoldedWeights

__all__ = ["PassesSaved", "backward", "fold", "forward", "takes"]

KEPT = 0.45
"""The pools are saved too if gate map and pools are at most this share of the input."""


def takes(x: Tensor) -> bool:
    """Whether eager mode uses these passes for ``x``, (B, C, H, W): on CUDA, unless it is empty."""
    return x.device.type == "cuda" and x.numel() > 0


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, PassesSaved | None]:
    """`ema_timm.ops.cpu.chunks.forward`: (B, C, H, W) in and out."""
    g = split(x, groups)
    rows = gated_rows(g, pool(g, weights.gn_weight.dtype), weights.mix_weight, weights.mix_bias)
    mean, r = _norm(rows)
    means = shifted_means_reversed(g, rows.pooled)
    u = _cross_spatial_weights(means, weights)
    coef = (u * weights.gn_weight).mul_(r)
    logits = _normed_branch(rows, mean, u * weights.gn_bias, coef)
    seen, repeats = images(x, groups)
    taps = _taps(x, weights.kernel, repeats)
    logits.add_(_local_branch(seen, taps, groups))
    gate_map = logits.sigmoid_()
    out = torch.empty_like(x)
    torch.mul(g, gate_map[:, :, None], out=split(out, groups))
    if not save:
        return out, None
    small = rows.pooled.nbytes + gate_map.nbytes <= KEPT * x.nbytes
    pooled = rows.pooled if small else rows.pooled.new_empty(0)
    means = means.view(-1, 9 * g.shape[2]).to(x.dtype)
    return out, PassesSaved(pooled, gate_map, mean, r, u, coef, means, taps[0, 0])


def _norm(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean of scale·y and 1/std of it, (B, G, n) each."""
    e, gate_h = rows.deviation, rows.gate_h
    std, mean = torch.std_mean(e, 4, correction=0)  # (B, G, n, H)
    within = torch.linalg.vector_norm(std.mul_(gate_h), dim=3, dtype=gate_h.dtype)
    mean = (rows.shift - mean).mul_(gate_h)
    var, mean = torch.var_mean(mean, 3, correction=0)
    var.addcmul_(within, within, value=1 / e.shape[3])
    return mean, var.add_(EPS * scale(e) ** 2).rsqrt_()


def _cross_spatial_weights(means: Tensor, w: FoldedWeights) -> Tensor:
    """u, (B, G, n), from `shifted_means_reversed`."""
    n = means.shape[2]
    taps = w.vote_weight.reshape(-1, n, 9).flip(2)
    logits = convolve(means.view(-1, n, 9), taps, w.vote_bias)[..., 0]
    return logits.softmax(1).view(means.shape[:3])


def _normed_branch(rows: Rows, mean: Tensor, constant: Tensor, coef: Tensor) -> Tensor:
    """Σ_c coef_c·(y_c − mean_c) + constant_c, (B, G, H, W); takes the deviations."""
    slope = coef[..., None] * rows.gate_h
    # coef·(y − mean) + u·β = (coef·(s_h·κ − mean) + u·β) − slope·e
    constant.addcmul_(coef, mean, value=-1)
    constant = torch.addcmul(constant[..., None], slope, rows.shift)
    e = rows.deviation
    torch.addcmul(constant[..., None], slope[..., None], e, value=-1, out=e)
    return e.sum(2, dtype=coef.dtype)


def _taps(x: Tensor, kernel: Tensor, repeats: int) -> Tensor:
    """k, (9, n), as a sum of numbers of the type of ``x``, (repeats, 1 or 2, n, 9).

    What rounding it to half precision leaves out would grow with the mean of x.
    """
    parts = 1 if x.dtype == kernel.dtype else 2
    taps = x.new_empty((repeats, parts, *kernel.t().shape))
    taps[:, 0] = kernel.t()
    if parts == 2:
        torch.sub(kernel.t(), taps[:, 0], out=taps[:, 1])
    return taps


def _local_branch(seen: Tensor, taps: Tensor, groups: int) -> Tensor:
    """conv(g; k), (B, G, H, W), of a map as `images` gives it, in its type."""
    repeats, parts, n, _ = taps.shape
    out = convolve(seen, taps.view(-1, n, 3, 3), padding=1, groups=repeats)
    out = out.view(-1, groups, parts, *seen.shape[2:])
    return out[:, :, 0] if parts == 1 else out[:, :, 0].add_(out[:, :, 1])
