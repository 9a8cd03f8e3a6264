"""Steps of the backward that the hand-written forms of it share: eager, whole map and native."""

import torch
from torch import Tensor

from ema_timm.ops.weights import EmaWeights, FoldedWeights


def finish_weights(found: FoldedWeights, logits: Tensor, w: EmaWeights) -> EmaWeights:
    """From the gradients of the folded parameters to those of the layer's own.

    Args:
        found: Gradients through the votes, the mixing, the norm and k; β without its part in v.
        logits: The sum of dL over everything, (1,).
        w: The layer's parameters in the type of the statistics.
    """
    n = w.gn_bias.shape[0]
    v = w.gn_bias.softmax(0)
    kernel = found.kernel.t().reshape(9 * n)
    dv = torch.mv(w.conv3x3_weight.reshape(n, 9 * n), kernel).addcmul_(w.conv3x3_bias, logits)
    return EmaWeights(
        found.mix_weight.view_as(w.conv1x1_weight),
        found.mix_bias,
        torch.addr(found.vote_weight, v, kernel).view_as(w.conv3x3_weight),
        torch.addcmul(found.vote_bias, v, logits),
        found.gn_weight,
        found.gn_bias + torch._softmax_backward_data(dv, v, 0, dv.dtype),
    )


def spread_taps(dtaps: Tensor, drow: Tensor, dcol: Tensor) -> None:
    """Add the gradients of the shifted means, but for the corners, to those of rows and columns.

    A tap reaches every pixel but the border row and column that its shift leaves out.

    Args:
        dtaps: Gradient of each tap's sum, (T, n, 3, 3) for T tiles of n channels.
        drow: What every pixel of a row receives, (T, n, H); changed in place.
        dcol: What every pixel of a column receives, (T, n, W); changed in place.
    """
    drow += dtaps.sum((2, 3))[..., None]
    drow[..., -1] -= dtaps[..., 0, :].sum(-1)
    drow[..., 0] -= dtaps[..., 2, :].sum(-1)
    dcol[..., -1] -= dtaps[..., :, 0].sum(-1)
    dcol[..., 0] -= dtaps[..., :, 2].sum(-1)
