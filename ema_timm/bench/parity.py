"""Parity with the definition, before anything is timed: who does not agree gets no time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.errors import first_line
from ema_timm.ops import EmaWeights, ema_attention
from ema_timm.ops.gpu.choices import Layer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error against the float64 reference: output and gradients, in norm."""

PUBLISHED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
"""The same for the published arrangement, the yardstick: in half precision its gradient of the 1×1
convolution's bias, where rows and columns nearly cancel, is rounding for the most part."""


def layer_errors(
    layers: Mapping[str, EmaAttn], x: Tensor, upstream: Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest relative error of output and gradients against the float64 reference.

    Args:
        layers: Variants of one EMA layer with the same weights, by name.
        x: Feature map, (B, C, H, W), with a gradient.
        upstream: Gradient of the output.

    Returns:
        The error of those that ran, and of the others the first line of what they raised.
    """
    oracle = EmaAttn(x.shape[1], largest_group_count(x.shape[1])).double().to(x.device)
    first = next(iter(layers.values()))
    oracle.load_state_dict(first.state_dict())
    oracle.impl = "reference"
    exact = x.detach().double().requires_grad_()
    out = oracle(exact)
    parameters = list(oracle.parameters())
    wanted = [out.detach(), *torch.autograd.grad(out, [exact, *parameters], upstream.double())]
    errors, failed = {}, {}
    for name, layer in layers.items():
        try:
            out = layer(x)
            inputs = [x, *layer.parameters()]
            gradients = torch.autograd.grad(out, inputs, upstream, materialize_grads=True)
            found = [out.detach(), *gradients]
            errors[name] = max(
                float((got.double() - want).norm() / want.norm())
                for got, want in zip(found, wanted, strict=True)
            )
        except Exception as error:  # compilers' and drivers' errors have nothing else in common
            failed[name] = first_line(error)
    return errors, failed


@torch.no_grad()
def network_error(model: nn.Module, images: Tensor) -> float | None:
    """Relative difference of the logits with every EMA layer by definition; None without any."""
    if not any(isinstance(m, EmaAttn) for m in model.modules()):
        return None
    model.eval()
    out = model(images)
    with by_definition(model):
        want = model(images)
    return float((out - want).norm() / want.norm())


@contextlib.contextmanager
def by_definition(model: nn.Module) -> Iterator[None]:
    """Within the block every EMA layer of ``model`` computes as the paper defines it."""
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    # AuthorsForm is an EmaAttn that computes otherwise: the definition is forced on it as well.
    for layer in layers:
        layer.forward = partial(_by_definition, layer)
    yield
    for layer in layers:
        del layer.forward


def _by_definition(layer: EmaAttn, x: Tensor) -> Tensor:
    return ema_attention(x, layer.weights(), layer.groups, impl="reference")


# MERGED: One layer with numbers in it, and how far a candidate is from the definition at its full size.
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
