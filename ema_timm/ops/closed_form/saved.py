"""What a hand-written forward keeps for its backward, beyond the input and the weights."""

from typing import NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """What the backward needs; BG = B·G tiles, n = C / G channels of a group, H height, W width.

    Attributes:
        gates: Gates along H and W, (BG, n, H + W).
        gate_map: A = sigmoid(L), (BG, H, W).
        vectors: Mean of y, what its rounding leaves, 1/std of y, and u, (4, BG, n).
    """

    gates: Tensor
    gate_map: Tensor
    vectors: Tensor


def new_saved(x: Tensor, groups: int, dtype: torch.dtype) -> Saved:
    """Memory for what the backward of ``x``, (B, C, H, W), will need.

    Args:
        x: The input of the forward.
        groups: G; divides C.
        dtype: The type of the statistics.
    """
    batch, channels, height, width = x.shape
    tiles, n = batch * groups, channels // groups
    return Saved(
        x.new_empty((tiles, n, height + width), dtype=dtype),
        x.new_empty((tiles, height, width), dtype=dtype),
        x.new_empty((4, tiles, n), dtype=dtype),
    )
