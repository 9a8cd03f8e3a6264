"""What a layer's weights become before the kernels take them, in as few operators as possible.

n channels of a group. It is `ema_timm.ops.closed_form.formula.fold`, whose operators are more and
are those of the CPU; on a GPU each of them is a launch, however small.
"""

import torch
from torch import Tensor

from ema_timm.ops.closed_form.formula import constant_channel_weights
from ema_timm.ops.weights import EmaWeights, FoldedWeights


def fold(w: EmaWeights) -> FoldedWeights:
    """The folded weights, contiguous."""
    return fold_with_votes(w)[0]


def fold_with_votes(w: EmaWeights) -> tuple[FoldedWeights, Tensor]:
    """The folded weights, contiguous, and v, the softmax of β, (n,)."""
    n = w.gn_bias.shape[0]
    v = constant_channel_weights(w.gn_bias)
    taps = w.conv3x3_weight.reshape(n, n, 9).transpose(1, 2)
    biases = w.conv3x3_bias.reshape(n, 1, 1).expand(n, 1, n)
    kernel, constant = (torch.cat([taps, biases], 1) * v[:, None, None]).sum(0).split([9, 1])
    weights = FoldedWeights(
        w.conv1x1_weight.reshape(n, n),
        w.conv1x1_bias,
        kernel,
        w.conv3x3_weight.reshape(n, 9 * n),
        w.conv3x3_bias,
        w.gn_weight,
        w.gn_bias + constant[0],
    )
    return FoldedWeights(*[t.contiguous() for t in weights]), v
