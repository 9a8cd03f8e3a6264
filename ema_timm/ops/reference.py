"""EMA attention as the paper defines it, step by step: the oracle. Never optimised.

B batch, C channels, G groups, n = C / G, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.weights import EPS, EmaWeights


def reference(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """Efficient Multi-scale Attention, Ouyang et al., ICASSP 2023, arXiv:2305.13563, figure 3.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    batch, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    w = EmaWeights(*[t.to(dtype) for t in weights])
    g = x.to(dtype).reshape(batch * groups, channels // groups, height, width)  # (B·G, n, H, W)

    # Directional gates: pool along each axis, mix channels with one shared 1×1 convolution.
    row = g.mean(3, keepdim=True)  # (B·G, n, H, 1)
    col = g.mean(2, keepdim=True).transpose(2, 3)  # (B·G, n, W, 1)
    mixed = F.conv2d(torch.cat([row, col], dim=2), w.conv1x1_weight, w.conv1x1_bias)
    gate_h, gate_w = mixed.sigmoid().split([height, width], dim=2)
    y = g * gate_h * gate_w.transpose(2, 3)

    # Branch 1 is instance-normalised, branch 2 sees a 3×3 neighbourhood.
    mean = y.mean((2, 3), keepdim=True)
    var = (y - mean).square().mean((2, 3), keepdim=True)
    x1 = (y - mean) * (var + EPS).rsqrt()
    x1 = x1 * w.gn_weight.view(1, -1, 1, 1) + w.gn_bias.view(1, -1, 1, 1)
    x2 = F.conv2d(g, w.conv3x3_weight, w.conv3x3_bias, padding=1)

    # Cross-spatial learning: each branch's pooled channels weigh the other branch's map.
    v = x1.mean((2, 3)).softmax(1)[:, :, None, None]  # (B·G, n, 1, 1)
    u = x2.mean((2, 3)).softmax(1)[:, :, None, None]
    logits = (v * x2).sum(1, keepdim=True) + (u * x1).sum(1, keepdim=True)  # (B·G, 1, H, W)
    gated = (g * logits.sigmoid()).reshape(x.shape).to(x.dtype)
    if torch.jit.is_tracing():  # PyTorch's TorchScript-based ONNX exporter cannot write a copy
        return gated
    # A new buffer, laid out like x.
    return torch.empty_like(x).copy_(gated)


def relative_difference(found: Tensor, want: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value of ``want``."""
    return float((found - want).abs().max() / want.abs().max().clamp(min=1e-30))
