"""The oracle: output and every gradient of the definition, in float64.

An implementation is compared in its own precision on the very numbers it was given: inputs are
rounded to the tested type first, then widened for the oracle.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.reference import reference
from ema_timm.ops.weights import EmaWeights

NAMES = ("x", *EmaWeights._fields)

# Largest error allowed, relative to the largest number of the oracle's tensor.
TOLERANCES = {
    torch.float64: 1e-9,  # rounding of sums of a few thousand terms, with room for small maps
    torch.float32: 2e-4,  # the instance norm of a map of two pixels magnifies rounding ~100 times
    torch.bfloat16: 2e-2,  # 8 bits of mantissa: one rounding of out and of each gradient is 4e-3
    torch.float16: 4e-3,  # 11 bits: one rounding is 5e-4
}


class Case(NamedTuple):
    """One input: what goes in and the gradient that comes back."""

    x: Tensor
    weights: EmaWeights
    groups: int
    grad: Tensor


def make_weights(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> EmaWeights:
    """Weights of a layer with groups of ``n`` channels, every parameter away from its default."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        values = torch.randn(shape, generator=gen, dtype=torch.float64) * scale + mean
        return values.to(dtype).requires_grad_()

    return EmaWeights(
        normal(n, n, 1, 1, scale=n**-0.5),
        normal(n, scale=0.5),
        normal(n, n, 3, 3, scale=(9 * n) ** -0.5),
        normal(n, scale=0.5),
        normal(n, scale=0.5, mean=1.0),
        normal(n, scale=0.5),
    )


def make_case(
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> Case:
    """A random case; ``layout`` is contiguous, channels_last, sliced or transposed."""
    batch, channels, height, width = shape
    gen = torch.Generator().manual_seed(seed + 1)

    def normal(*size):
        return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

    x = normal(*shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = normal(batch, channels + 1, height + 2, 2 * width)[:, 1:, 1:-1, ::2]
    elif layout == "transposed":
        x = normal(batch, channels, width, height).transpose(2, 3)
    x = x.detach().requires_grad_()
    weights = make_weights(channels // groups, dtype, seed)
    return Case(x, weights, groups, normal(*shape))


def widened(case: Case) -> Case:
    """The same numbers as leaves in float64."""

    def widen(t: Tensor) -> Tensor:
        return t.detach().double().contiguous().requires_grad_(t.requires_grad)

    return Case(widen(case.x), EmaWeights(*map(widen, case.weights)), case.groups, widen(case.grad))


def output_and_gradients(function: Callable, case: Case) -> dict[str, Tensor]:
    """Run ``function(x, weights, groups)`` forward and backward."""
    out = function(case.x, case.weights, case.groups)
    found = torch.autograd.grad(out, [case.x, *case.weights], case.grad)
    return {"out": out.detach(), **dict(zip(NAMES, found, strict=True))}


def expected(case: Case) -> dict[str, Tensor]:
    """Output and every gradient of the definition, float64."""
    return output_and_gradients(reference, widened(case))


def relative_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference over the largest expected magnitude (or ``scale``)."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() if scale is None else scale
    return (actual.double() - expected).abs().max().item() / max(scale, 1e-30)


def assert_matches(
    function: Callable,
    case: Case,
    tolerance: float | None = None,
    names: Sequence[str] = ("out", *NAMES),
) -> None:
    """Output and every gradient of ``function`` equal the oracle's, and look like their inputs.

    ``names`` are those that are compared; all are finite.
    """
    tolerance = TOLERANCES[case.x.dtype] if tolerance is None else tolerance
    truth = expected(case)
    found = output_and_gradients(function, case)
    assert found["out"].dtype == case.x.dtype
    assert found["out"].shape == case.x.shape
    # A gradient that the definition makes zero is rounding noise, measured on the scale of the
    # other tensors. On a map of one pixel those of the gates are, and the norm of a constant map
    # magnifies a rounding of 2^-24 by 1/sqrt(eps) = 316, to 2e-5 of that scale.
    floor = 0.1 if case.x.shape[2:].numel() == 1 else 0.01
    floor *= max(t.abs().max().item() for t in truth.values() if t.numel())
    for name, value in truth.items():
        assert found[name].isfinite().all(), f"{name} is not finite"
        scale = max(value.abs().max().item(), floor) if value.numel() else 1.0
        if name not in names:
            continue
        error = relative_error(found[name], value, scale)
        assert error <= tolerance, f"{name}: relative error {error:.2e} over {tolerance:.0e}"
