"""The weights of the exported operator, and pooling as matrix products for small maps.

The letters are those of `ema_timm.ops.export.dialects`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.weights import FoldedWeights


class ExportedWeights(NamedTuple):
    """Folded weights in the shapes that the exported graph uses.

    Attributes:
        mix_weight: The 1×1 convolution, (n, n, 1, 1).
        mix_bias: (n,).
        kernel: The collapsed 3×3 convolution as a transposed convolution, that is rotated by half
            a turn, (n, 1, 3, 3).
        vote_weight: Maps the edge features to the logits of u, (9n, n).
        vote_bias: (n,).
        gn_weight: γ, (n,).
        gn_bias: β + v·b₃, (n,).
    """

    mix_weight: Tensor
    mix_bias: Tensor
    kernel: Tensor
    vote_weight: Tensor
    vote_bias: Tensor
    gn_weight: Tensor
    gn_bias: Tensor


class SmallMap(NamedTuple):
    """Pooling and its inverse as matrix products, for maps of one small size.

    Attributes:
        pool: From a map to its row means, column means and edge features, (HW, H + W + 9).
        spread_h: From gates along the height to a map, (H, HW).
        spread_w: From gates along the width to a map, (W, HW).
    """

    pool: Tensor
    spread_h: Tensor
    spread_w: Tensor


def arrange(w: FoldedWeights) -> ExportedWeights:
    """Compute `ExportedWeights` from folded weights; no input is needed."""
    n = w.gn_bias.shape[0]
    taps = w.vote_weight.reshape(n, n, 3, 3)
    # Every tap sees the whole; +1 all but the first row or column, -1 all but the last.
    ends = torch.cat([taps.sum(2, keepdim=True), -taps[:, :, 2:], -taps[:, :, :1]], 2)
    ends = torch.cat([ends.sum(3, keepdim=True), -ends[:, :, :, 2:], -ends[:, :, :, :1]], 3)
    return ExportedWeights(
        w.mix_weight.reshape(n, n, 1, 1),
        w.mix_bias,
        w.kernel.t().reshape(n, 1, 3, 3).flip([2, 3]),
        ends.reshape(n, 9 * n).t(),
        w.vote_bias,
        w.gn_weight,
        w.gn_bias,
    )


def small_map(height: int, width: int) -> SmallMap:
    """The matrices of `SmallMap`, float64."""
    rows = torch.eye(height, dtype=torch.float64)
    columns = torch.eye(width, dtype=torch.float64)
    over_h, over_w = rows.sum(1, keepdim=True) / height, columns.sum(1, keepdim=True) / width
    ends_h, ends_w = (
        torch.cat([over, over * side[:, :1], over * side[:, -1:]], 1)
        for over, side in ((over_h, rows), (over_w, columns))
    )
    pairs = ((rows, over_w), (over_h, columns), (ends_h, ends_w))
    return SmallMap(
        torch.cat([torch.kron(a, b) for a, b in pairs], 1),
        torch.kron(rows, columns.sum(0, keepdim=True)),
        torch.kron(rows.sum(0, keepdim=True), columns),
    )
