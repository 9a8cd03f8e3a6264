"""One layer with numbers in it, and how far a candidate is from the definition at its full size.

The definition takes much memory in float64, so it is worked out for the first and the last sample
alone. The upstream gradient is zero at all others: then the parameters' gradients, which are sums
over the batch, are those of these samples too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.bench.parity import TOLERANCE
from ema_timm.ops import EmaWeights, ema_attention
from ema_timm.ops.choices import Layer

Candidate = Callable[[Tensor, EmaWeights, int], Tensor]
"""(feature map, parameters of a layer, groups) -> the gated map."""

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_FLOOR = 0.1
"""A tensor that the definition makes zero is noise, on the scale of a tenth of the others."""


class Case(NamedTuple):
    """Numbers of one layer.

    Attributes:
        x: Feature map, (B, C, H, W), as the layer meets it.
        weights: Parameters, away from special values such as γ = 1.
        groups: G.
        upstream: Gradient of the output, for a backward; None for inference.
        truth: Output, and for a backward all gradients, of the samples at `ends`, in float64.
    """

    x: Tensor
    weights: EmaWeights
    groups: int
    upstream: Tensor | None
    truth: list[Tensor]


def make_case(layer: Layer, kind: torch.dtype, device: torch.device) -> Case:
    """Random numbers of ``layer``, always the same ones.

    Args:
        layer: Its shape.
        kind: Type of its parameters.
        device: Where to.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, layer.dtype)
    shape = layer.batch, layer.channels, layer.height, layer.width

    def normal(shape, dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = (
        normal(shape, dtype)
        .contiguous(memory_format=_FORMATS[layer.layout])
        .requires_grad_(layer.training)
    )
    n = layer.channels // layer.groups
    weights = EmaWeights(
        normal((n, n, 1, 1), kind) * n**-0.5,
        normal(n, kind) * 0.5,
        normal((n, n, 3, 3), kind) * (9 * n) ** -0.5,
        normal(n, kind) * 0.5,
        normal(n, kind) * 0.5 + 1,
        normal(n, kind) * 0.5,
    )
    weights = EmaWeights(*[w.requires_grad_(layer.training) for w in weights])
    upstream = None
    if layer.training:
        upstream = torch.zeros_like(x)
        upstream[ends(x)] = normal((len(ends(x)), *shape[1:]), dtype)
    return Case(x, weights, layer.groups, upstream, _truth(x, weights, layer.groups, upstream))


def ends(x: Tensor) -> list[int]:
    """The first and the last sample of ``x``."""
    return sorted({0, len(x) - 1})


def call_of(run: Candidate, case: Case) -> Callable[[], list[Tensor]]:
    """A call that gives the output, and for a backward the gradients of ``x`` and the weights."""

    def call() -> list[Tensor]:
        """Once, as a network does it."""
        if case.upstream is None:
            with torch.no_grad():
                return [run(case.x, case.weights, case.groups)]
        out = run(case.x, case.weights, case.groups)
        return [out.detach(), *torch.autograd.grad(out, [case.x, *case.weights], case.upstream)]

    return call


def error_of(run: Candidate, case: Case) -> float:
    """Largest relative error of ``run``, as a root of mean squares; infinite where not finite.

    Raises:
        ValueError: If the output has another shape or type than the feature map.
    """
    found = call_of(run, case)()
    if found[0].shape != case.x.shape or found[0].dtype != case.x.dtype:
        raise ValueError(f"the output is {tuple(found[0].shape)}, {found[0].dtype}")
    if not all(bool(t.isfinite().all()) for t in found):
        return float("inf")
    found[:2] = [t[ends(case.x)] for t in found[:2]]
    scales = [_size(t) for t in case.truth]
    return max(
        _size(got.double() - want) / max(scale, _FLOOR * max(scales), 1e-30)
        for got, want, scale in zip(found, case.truth, scales, strict=True)
    )


def tolerance(layer: Layer) -> float:
    """The largest error that a candidate may have at ``layer``."""
    return TOLERANCE[getattr(torch, layer.dtype)]


def _size(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _truth(x: Tensor, weights: EmaWeights, groups: int, upstream: Tensor | None) -> list[Tensor]:
    at = ends(x)
    exact = Case(
        x.detach()[at].double().requires_grad_(x.requires_grad),
        EmaWeights(*[w.detach().double().requires_grad_(w.requires_grad) for w in weights]),
        groups,
        None if upstream is None else upstream[at].double(),
        [],
    )
    return call_of(lambda *layer: ema_attention(*layer, impl="reference"), exact)()
