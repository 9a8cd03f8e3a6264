"""EMA attention without cross-spatial learning: the ablation, a separate operator.

The paper's module ends with a cross-spatial step: the pooled channels of each branch weight the map
of the other branch, and all channels of a group share one gate map. Without that step the two
parallel branches are added as they are, and each channel keeps its own gate map:

    A = σ(x1 + x2),  out = g · A,

with x1 and x2 as in `ema_timm.ops.reference`. The authors released no code for their ablation; this
is the reading that takes away the step and changes nothing else: the parameters, the gates along
height and width, the norm and the 3×3 convolution are the same.

The identities of `ema_timm.ops.formula` all come from the step that is missing here (v is constant,
so one output channel of the convolution is enough; u needs only its means). Nothing makes this
operator cheaper: the convolution is computed in full.

B batch, C channels, G groups, n = C / G, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.weights import EPS, EmaWeights, laid_out_like


def parallel(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """Gate ``x`` by the sum of both branches; plain operations that trace anywhere.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    height, dtype = x.shape[2], torch.promote_types(x.dtype, torch.float32)
    g = x.to(dtype).reshape(-1, x.shape[1] // groups, height, x.shape[3])  # (B·G, n, H, W)
    return laid_out_like(x, (g * channel_logits(g, weights).sigmoid()).reshape(x.shape))


def channel_logits(g: Tensor, weights: EmaWeights, eps: float = EPS) -> Tensor:
    """The sum x1 + x2 of both branches, whose sigmoid is the gate map of each channel.

    Args:
        g: Channel groups of the feature map in the type of the statistics, (B·G, n, H, W).
        weights: Parameters of one layer, of any floating point type.
        eps: Added to the variance of the instance norm.

    Returns:
        (B·G, n, H, W).
    """
    height, dtype = g.shape[2], g.dtype
    row = g.mean(3, keepdim=True)  # (B·G, n, H, 1)
    col = g.mean(2).unsqueeze(3)  # (B·G, n, W, 1)
    mixed = F.conv2d(
        torch.cat([row, col], 2), weights.conv1x1_weight.to(dtype), weights.conv1x1_bias.to(dtype)
    )
    gates = mixed.sigmoid()
    y = g * gates[:, :, :height] * gates[:, :, height:].transpose(2, 3)

    # Centred before squaring: E[y²] − μ² cancels where the mean is large.
    centred = y - y.mean((2, 3), keepdim=True)
    # Divided, not multiplied by 1/std: ONNX Runtime drops a factor of fresh ones and trips over it.
    scale = weights.gn_weight.to(dtype) / (centred.square().mean((2, 3)) + eps).sqrt()  # (B·G, n)
    normed = centred * scale[:, :, None, None]
    # β is added with the convolution's bias.
    bias = weights.conv3x3_bias.to(dtype) + weights.gn_bias.to(dtype)
    return normed + F.conv2d(g, weights.conv3x3_weight.to(dtype), bias, padding=1)
