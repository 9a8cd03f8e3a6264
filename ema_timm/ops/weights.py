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


class FoldedWeights(NamedTuple):
    """The parameters of one layer with everything that depends on weights alone worked out.

    Attributes:
        mix_weight: The 1×1 convolution, (n, n).
        mix_bias: (n,).
        kernel: Identity b, k of the collapsed 3×3 convolution, (9, n).
        vote_weight: Makes the logits of u from the shifted means, (n, 9n).
        vote_bias: (n,).
        gn_weight: γ, (n,).
        gn_bias: β + v·b₃, (n,); as Σ_c u_c = 1, the constant of identity b rides on β.
    """

    mix_weight: Tensor
    mix_bias: Tensor
    kernel: Tensor
    vote_weight: Tensor
    vote_bias: Tensor
    gn_weight: Tensor
    gn_bias: Tensor


def shapes(n: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of `EmaWeights` for groups of ``n`` channels, in the order of its fields."""
    return (n, n, 1, 1), (n,), (n, n, 3, 3), (n,), (n,), (n,)


def fits(weights: EmaWeights, n: int) -> bool:
    """Whether all ``weights`` are of groups of ``n`` channels."""
    return tuple([w.shape for w in weights]) == shapes(n)


def misfit(weights: EmaWeights, n: int) -> str:
    """The error for ``weights`` that are not of groups of ``n`` channels."""
    wrong = [
        f"{name} must be {shape}, got {tuple(w.shape)}"
        for name, w, shape in zip(weights._fields, weights, shapes(n), strict=True)
        if w.shape != shape
    ]
    return (
        f"The layer's weights do not fit together; in groups of {n} channels {', '.join(wrong)}. "
        "Give the layer the parameters that it was made with."
    )
