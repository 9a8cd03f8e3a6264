"""The parameters of one EMA attention layer, and the check that a feature map fits them."""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
"""Added to the variance of the instance norm; the value of the paper's code."""


def laid_out_like(x: Tensor, gated: Tensor) -> Tensor:
    """A new buffer with the values of ``gated``, in the dtype and memory format of ``x``.

    Networks add the shortcut to it in place.
    """
    if torch.jit.is_tracing():  # a copy into empty memory is more than the ONNX exporter takes
        return gated.to(x.dtype)
    return torch.empty_like(x).copy_(gated.to(x.dtype))


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
    """The parameters of one layer with every product of weights already computed.

    Attributes:
        mix_weight: The 1×1 convolution, (n, n).
        mix_bias: (n,).
        kernel: Identity b, k of the collapsed 3×3 convolution, (9, n).
        vote_weight: Makes the logits of u from the shifted means, (n, 9n).
        vote_bias: (n,).
        gn_weight: γ, (n,).
        gn_bias: β + v·b₃, (n,). The constant of identity b is added to β, because Σ_c u_c = 1.
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


def require_fit(x: Tensor, weights: EmaWeights, groups: int) -> None:
    """Check that ``x`` is a map that ``weights`` and ``groups`` fit.

    Raises:
        ValueError: If the shapes do not fit together, or ``groups`` is below 1.
        TypeError: If ``x`` is not floating point, or ``groups`` is not an int.
    """
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r} ({type(groups).__name__}).")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}.")
    n = weights.gn_weight.numel()
    if x.dim() == 4 and not fits(weights, n):
        raise ValueError(misfit(weights, x.shape[1] // groups))
    require_map(x, groups, n)


def require_map(x: Tensor, groups: int, n: int) -> None:
    """Check that ``x`` is a feature map of ``groups`` groups of ``n`` channels.

    Raises:
        ValueError: If it has another shape.
        TypeError: If it is not floating point.
    """
    if x.dim() != 4:
        raise ValueError(
            f"x must be a feature map of 4 dimensions (B, C, H, W), got {x.dim()} with shape "
            f"{tuple(x.shape)}. {_as_map(x.shape, groups * n)}"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating point, got {x.dtype}. Convert it first, for example with "
            "x.float()."
        )
    if x.shape[1] != groups * n:
        raise ValueError(
            f"The layer's weights are for {groups * n} channels ({groups} groups of {n}), got "
            f"input with {x.shape[1]} channels, shape {tuple(x.shape)}. Build the layer as "
            f"EmaAttn({x.shape[1]}) or give it the feature map it was made for."
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"H and W must be at least 1, got shape {tuple(x.shape)}.")


def _as_map(shape: torch.Size, channels: int) -> str:
    """How to give a tensor of another number of dimensions as a map, by where its channels are."""
    places = [index for index, size in enumerate(shape) if size == channels]
    hints = {
        (3, 0): "Add the batch dimension: x.unsqueeze(0).",
        (3, 1): "Give a sequence (B, C, L) as a map of one row: x.unsqueeze(2).",
        (3, 2): "Reshape tokens (B, H·W, C) to a map: x.transpose(1, 2).unflatten(2, (H, W)).",
        (5, 1): "Move the frames of (B, C, T, H, W) to the batch: x.transpose(1, 2).flatten(0, 1).",
        (5, 2): "Move the frames of (B, T, C, H, W) to the batch: x.flatten(0, 1).",
    }
    found = [hints[len(shape), place] for place in places if (len(shape), place) in hints]
    return " Or: ".join(found) or f"Give a map with C = {channels}."
