"""The parameters of one EMA attention layer, as every implementation takes them."""

from typing import NamedTuple

from torch import Tensor

EPS = 1e-5
"""Added to the variance of the instance norm; the value of the paper's code."""


class EmaWeights(NamedTuple):
    """Parameters of one layer, shared by all channel groups. n is the channels of one group.

    Attributes:
        conv1x1_weight: (n, n, 1, 1).
        conv1x1_bias: (n,).
        conv3x3_weight: (n, n, 3, 3).
        conv3x3_bias: (n,).
        gn_weight: γ of the instance norm, (n,).
        gn_bias: β of the instance norm, (n,).
    """

    conv1x1_weight: Tensor
    conv1x1_bias: Tensor
    conv3x3_weight: Tensor
    conv3x3_bias: Tensor
    gn_weight: Tensor
    gn_bias: Tensor
