"""What a layer's weights become before a GPU's passes take them, in as few operators as possible.

n channels of a group. It is `ema_timm.ops.formula.fold`, whose operators are more and
are those that converters know; on a GPU each of them is a launch, however small.
"""

import torch
from torch import Tensor

from ema_timm.ops.formula import constant_channel_weights
from ema_timm.ops.weights import EmaWeights, FoldedWeights


def fold(w: EmaWeights) -> FoldedWeights:
    """The folded weights."""
    return fold_with_votes(w)[0]


def fold_with_votes(w: EmaWeights) -> tuple[FoldedWeights, Tensor]:
    """The folded weights and v, the softmax of β, (n,)."""
    n = w.gn_bias.shape[0]
    v = constant_channel_weights(w.gn_bias)
    # A product with one vector is never rounded to TF32.
    kernel = torch.mv(w.conv3x3_weight.reshape(n, 9 * n).t(), v)
    weights = FoldedWeights(
        w.conv1x1_weight.reshape(n, n),
        w.conv1x1_bias,
        kernel.view(n, 9).t(),
        w.conv3x3_weight.reshape(n, 9 * n),
        w.conv3x3_bias,
        w.gn_weight,
        w.gn_bias + torch.dot(v, w.conv3x3_bias),
    )
    return weights, v
