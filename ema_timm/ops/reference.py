"""EMA attention as the paper defines it, step by step: the oracle. Never optimised.

B batch, C channels, G groups, n = C / G, H height, W width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.weights import EPS, EmaWeights, laid_out_like

# torch.fx keeps it whole: it reads the type of a tensor, which a proxy does not have.
torch.fx.wrap("widened")


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in the type of the statistics, float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def definition(
    x: Tensor,
    groups: int,
    mix: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    conv: Callable[[Tensor], Tensor],
    cross_spatial: bool = True,
) -> Tensor:
    """Efficient Multi-scale Attention, Ouyang et al., ICASSP 2023, arXiv:2305.13563, figure 3.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        groups: G; divides C.
        mix: The 1×1 convolution, on (B·G, n, H + W, 1).
        norm: The instance norm, on (B·G, n, H, W).
        conv: The 3×3 convolution, on (B·G, n, H, W).
        cross_spatial: False is the ablation of `ema_timm.ops.parallel`.

    Returns:
        (B, C, H, W), contiguous, of the type that the functions lead to.
    """
    batch, channels, height, width = x.shape
    g = x.reshape(batch * groups, channels // groups, height, width)  # (B·G, n, H, W)

    # Directional gates: pool along each axis, mix channels with one shared 1×1 convolution.
    row = g.mean(3, keepdim=True)  # (B·G, n, H, 1)
    col = g.mean(2, keepdim=True).transpose(2, 3)  # (B·G, n, W, 1)
    gate_h, gate_w = mix(torch.cat([row, col], dim=2)).sigmoid().split([height, width], dim=2)
    y = g * gate_h * gate_w.transpose(2, 3)

    # Branch 1 is instance-normalised, branch 2 sees a 3×3 neighbourhood.
    x1, x2 = widened(norm(y)), widened(conv(g))
    if not cross_spatial:
        return (g * (x1 + x2).sigmoid()).reshape(batch, channels, height, width)

    # Cross-spatial learning: each branch's pooled channels weigh the other branch's map.
    v = x1.mean((2, 3)).softmax(1)[:, :, None, None]  # (B·G, n, 1, 1)
    u = x2.mean((2, 3)).softmax(1)[:, :, None, None]
    logits = (v * x2).sum(1, keepdim=True) + (u * x1).sum(1, keepdim=True)  # (B·G, 1, H, W)
    return (g * logits.sigmoid()).reshape(batch, channels, height, width)


def reference(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`definition` with the parameters of one layer, in float32 or wider.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    w = EmaWeights(*[t.to(dtype) for t in weights])
    gated = definition(
        x.to(dtype),
        groups,
        partial(F.conv2d, weight=w.conv1x1_weight, bias=w.conv1x1_bias),
        partial(_instance_norm, weight=w.gn_weight, bias=w.gn_bias),
        partial(F.conv2d, weight=w.conv3x3_weight, bias=w.conv3x3_bias, padding=1),
    )
    return laid_out_like(x, gated)


def _instance_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = y.mean((2, 3), keepdim=True)
    var = (y - mean).square().mean((2, 3), keepdim=True)
    x1 = (y - mean) * (var + EPS).rsqrt()
    return x1 * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def relative_difference(found: Tensor, want: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value of ``want``."""
    return float((found - want).abs().max() / want.abs().max().clamp(min=1e-30))
