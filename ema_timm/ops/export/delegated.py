"""`exported` in operators that mobile delegates take whole: XNNPACK, by ExecuTorch.

A delegate takes a graph apart at every operator that it lacks: means along one axis, selections,
products of small matrices. Here means are average pools, broadcasts stay in four dimensions, and
all weights lie as the operators want them, so that a network is one piece.

The letters are those of `ema_timm.ops.export.exported`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.export.exported import ExportedWeights
from ema_timm.ops.weights import EPS


def arranged_for_delegates(w: ExportedWeights) -> ExportedWeights:
    """Weights as the operators want them.

    ``kernel`` becomes a convolution's, (1, n, 3, 3); ``vote_weight``, (n, 9n), and ``gn_bias``,
    (1, n), those of linear layers.
    """
    return w._replace(
        kernel=w.kernel.flip([2, 3]).transpose(0, 1).contiguous(),
        vote_weight=w.vote_weight.t().contiguous(),
        gn_bias=w.gn_bias.unsqueeze(0),
    )


def delegated(x: Tensor, w: ExportedWeights, groups: int, eps: float = EPS) -> Tensor:
    """EMA attention for one size of map.

    Args:
        x: Feature map, (B, C, H, W), in the type of ``w``.
        w: From `arranged_for_delegates`.
        groups: G; divides C.
        eps: Added to the variance.

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    tiles, n = batch * groups, channels // groups
    g = x.reshape(tiles, n, height, width)
    row, col = F.avg_pool2d(g, (1, width)), F.avg_pool2d(g, (height, 1))
    pools = torch.cat([row, col.reshape(tiles, n, width, 1)], 2)
    gates = F.conv2d(pools, w.mix_weight, w.mix_bias).sigmoid()  # (T, n, H + W, 1)
    y = g * gates[:, :, :height] * gates[:, :, height:].reshape(tiles, n, 1, width)
    y = y - F.avg_pool2d(y, (height, width))
    r = (F.avg_pool2d(y * y, (height, width)) + eps).rsqrt()
    u = F.linear(_edge_features(g, col), w.vote_weight, w.vote_bias).softmax(1)  # (T, n)
    weight = (u.reshape(tiles, n, 1, 1) * r).reshape(tiles, 1, n) * w.gn_weight
    norm = torch.bmm(weight, y.reshape(tiles, n, height * width))
    shift = F.linear(u, w.gn_bias)
    logits = F.conv2d(g, w.kernel, padding=1) + norm.reshape(tiles, 1, height, width)
    gate = (logits + shift.reshape(tiles, 1, 1, 1)).sigmoid()
    return (g * gate).reshape(batch, channels, height, width)


def _edge_features(g: Tensor, col: Tensor) -> Tensor:
    """E[a, b] of ``g``, (T, 9n), from its means over H, (T, n, 1, W), too."""
    tiles, n, height, width = g.shape
    ends = [g[:, :, :1] * (1 / height), g[:, :, height - 1 :] * (1 / height)]
    over = torch.cat([col, *ends], 2)  # (T, n, 3, W)
    ends = [over[..., :1] * (1 / width), over[..., width - 1 :] * (1 / width)]
    return torch.cat([F.avg_pool2d(over, (1, width)), *ends], 3).reshape(tiles, 9 * n)
