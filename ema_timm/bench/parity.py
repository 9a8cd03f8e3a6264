"""Parity with the definition, before anything is timed: who does not agree gets no time."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.errors import first_line
from ema_timm.ops import ema_attention

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
