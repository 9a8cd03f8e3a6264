"""Agreement with the reference implementation in float64, checked before anything is timed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.ops import EmaWeights, ema_attention
from ema_timm.ops.gpu.choice_file import LAYOUTS, Layer

PARITY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""The largest `relative_error` of output and gradients, by dtype of the feature map."""

_FLOOR = 0.1
"""A tensor that is zero in exact arithmetic holds only rounding errors. They are compared with this
part of the largest tensor."""

Candidate = Callable[[Tensor, EmaWeights, int], Tensor]
"""(feature map, parameters of a layer, groups) -> the gated map."""


class Case(NamedTuple):
    """Inputs of one layer, and the exact results.

    Attributes:
        x: Feature map, (B, C, H, W).
        weights: Parameters, away from special values such as γ = 1.
        groups: G.
        upstream: Gradient of the output; None for inference.
        samples: Indices of the samples that are compared; ``upstream`` is 0 in all others.
        exact: Output of these samples, and with ``upstream`` all gradients, in float64.
    """

    x: Tensor
    weights: EmaWeights
    groups: int
    upstream: Tensor | None
    samples: list[int]
    exact: list[Tensor]


def make_case(
    layer: Layer, dtype: torch.dtype, device: torch.device, every_sample: bool = False
) -> Case:
    """Random inputs of ``layer``, the same ones in each call.

    Args:
        layer: Its shape.
        dtype: Of the parameters.
        device: Where to make them.
        every_sample: Compare all samples. Otherwise only the first and the last are compared,
            which needs far less memory.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = layer.batch, layer.channels, layer.height, layer.width

    def normal(shape, dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = normal(shape, getattr(torch, layer.dtype))
    x = x.contiguous(memory_format=LAYOUTS[layer.layout]).requires_grad_(layer.training)
    n = layer.channels // layer.groups
    weights = EmaWeights(
        normal((n, n, 1, 1), dtype) * n**-0.5,
        normal(n, dtype) * 0.5,
        normal((n, n, 3, 3), dtype) * (9 * n) ** -0.5,
        normal(n, dtype) * 0.5,
        normal(n, dtype) * 0.5 + 1,
        normal(n, dtype) * 0.5,
    )
    weights = EmaWeights(*[w.requires_grad_(layer.training) for w in weights])
    samples = list(range(len(x))) if every_sample else sorted({0, len(x) - 1})
    upstream = None
    if layer.training:
        upstream = torch.zeros_like(x)
        upstream[samples] = normal((len(samples), *shape[1:]), x.dtype)
    case = Case(x, weights, layer.groups, upstream, samples, [])
    return case._replace(exact=_exact(case))


def call_of(run: Candidate, case: Case) -> Callable[[], list[Tensor]]:
    """A call that returns the output, and for training the gradients of ``x`` and the weights."""

    def call() -> list[Tensor]:
        """Run the layer once, as a network does."""
        if case.upstream is None:
            with torch.no_grad():
                return [run(case.x, case.weights, case.groups)]
        out = run(case.x, case.weights, case.groups)
        inputs = [case.x, *case.weights]
        gradients = torch.autograd.grad(out, inputs, case.upstream, materialize_grads=True)
        return [out.detach(), *gradients]

    return call


def error_of(run: Candidate, case: Case) -> float:
    """The `relative_error` of ``run``; infinite if any sample is not finite.

    Raises:
        ValueError: If the output has another shape or dtype than the feature map.
    """
    found = call_of(run, case)()
    if found[0].shape != case.x.shape or found[0].dtype != case.x.dtype:
        raise ValueError(f"the output is {tuple(found[0].shape)}, {found[0].dtype}")
    if not all(bool(t.isfinite().all()) for t in found):
        return float("inf")
    found[:2] = [t[case.samples] for t in found[:2]]
    return relative_error(found, case.exact)


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors: root mean square of error over that of value.

    Args:
        found: What was computed.
        exact: The exact values, in the same order.
    """
    scales = [_rms(t) for t in exact]
    return max(
        _rms(got - want) / max(scale, _FLOOR * max(scales), 1e-30)
        for got, want, scale in zip(found, exact, scales, strict=True)
    )


@torch.no_grad()
def network_error(model: nn.Module, images: Tensor) -> float | None:
    """Relative error of a network's logits; None if the network has no EMA layer.

    The same network with every EMA layer in the reference implementation gives the exact logits.
    """
    if not any(isinstance(m, EmaAttn) for m in model.modules()):
        return None
    model.eval()
    out = model(images)
    with in_reference(model):
        return relative_error([out], [model(images)])


@contextlib.contextmanager
def in_reference(model: nn.Module) -> Iterator[None]:
    """Run every EMA layer of ``model`` in the reference implementation within the block."""
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    for layer in layers:  # `impl` does not reach subclasses with a forward of their own
        layer.forward = partial(_reference, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _reference(layer: EmaAttn, x: Tensor) -> Tensor:
    return ema_attention(x, layer.weights(), layer.groups, impl="reference")


def _exact(case: Case) -> list[Tensor]:
    x, upstream = case.x, case.upstream
    double = case._replace(
        x=x.detach()[case.samples].double().requires_grad_(x.requires_grad),
        weights=EmaWeights(
            *[w.detach().double().requires_grad_(w.requires_grad) for w in case.weights]
        ),
        upstream=None if upstream is None else upstream[case.samples].double(),
    )
    return call_of(partial(ema_attention, impl="reference"), double)()


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())
