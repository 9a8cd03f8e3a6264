"""``ema-timm bench layer``: one EMA layer, timm's other attention layers, and a copy."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.parity import PARITY_TOLERANCE, Case, error_of, make_case
from ema_timm.bench.timing import Clock, Timing, peak_extra_bytes, round_robin, saved_bytes
from ema_timm.environment import machine
from ema_timm.errors import first_line
from ema_timm.ops import IMPLEMENTATIONS
from ema_timm.ops.gpu.choice_file import Layer
from ema_timm.ops.gpu.fused.available import fused_unavailable

SHAPES = {
    "resnet50 stage 1": (256, 56, 56),
    "resnet50 stage 2": (512, 28, 28),
    "resnet50 stage 3": (1024, 14, 14),
    "resnet50 stage 4": (2048, 7, 7),
    "mobilenetv2_100 stage 2": (192, 28, 28),
    "mobilenetv2_100 stage 3": (384, 14, 14),
    "mobilenetv2_100 stage 4": (576, 14, 14),
    "mobilenetv2_100 stage 5": (960, 7, 7),
}
"""Feature maps of the EMA layers in these networks at 224 px: (C, H, W)."""

OTHERS = ("se", "eca", "cbam", "coord", "gc", "ela")
"""Attention layers of timm."""

CLONE = "clone"
"""A copy of the feature map: the lower bound of any layer."""


def bench_layer(
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    batch_size: int = 8,
    rounds: int = 15,
    device: str = "cpu",
    dtype: str = "float32",
    channels_last: bool = False,
    compiled: bool = True,
    progress: bool = True,
) -> dict:
    """Measure forward, forward + backward and memory of every variant at every shape.

    Args:
        shapes: (C, H, W) by name.
        batch_size: B.
        rounds: Samples of each variant.
        device: Where to run.
        dtype: float32, bfloat16 or float16.
        channels_last: Use channels-last memory format.
        compiled: Measure the default implementation under ``torch.compile`` too.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row per variant and shape. Times in ms, memory in bytes.
    """
    where = torch.device(device)
    layout = "channels_last" if channels_last else "contiguous"
    rows = []
    for place, (c, h, w) in shapes.items():
        layer = Layer(batch_size, c, largest_group_count(c), h, w, dtype, layout, training=True)
        torch.manual_seed(0)
        case = make_case(layer, getattr(torch, dtype), where, every_sample=True)
        rows += _bench_shape(place, case, rounds, compiled, progress)
    settings = {"batch": batch_size, "dtype": dtype, "memory_format": layout, "rounds": rounds}
    return {"bench": "layer", "machine": machine(where), "settings": settings, "rows": rows}


def _bench_shape(place: str, case: Case, rounds: int, compiled: bool, progress: bool) -> list[dict]:
    x = case.x
    variants = _variants(case, compiled)
    errors, failed = _errors({n: v.layer for n, v in variants.items() if v.ema}, case)
    case.exact.clear()  # frees its memory
    correct = {
        name: variant.layer
        for name, variant in variants.items()
        if not variant.ema or errors.get(name, float("inf")) <= _tolerance(name, x.dtype)
    }
    forward = {n: _forward(layer, x) for n, layer in correct.items()}
    both = {n: _forward_backward(layer, x, case.upstream) for n, layer in correct.items()}
    forward[CLONE] = both[CLONE] = x.detach().clone
    label, clock = f"{place} {tuple(x.shape)}", Clock(x.device)
    forward_ms = round_robin(forward, rounds, clock, f"{label} forward", progress)
    both_ms = round_robin(both, rounds, clock, f"{label} forward + backward", progress)
    rows = []
    for name in [*variants, CLONE]:
        row = {"place": place, "shape": list(x.shape), "variant": name}
        if name in errors:
            row |= {"error": errors[name], "parity": name in correct}
        if name in failed:
            row |= {"parity": False, "failed": failed[name]}
        if name in forward:
            row["forward_ms"] = forward_ms[name]._asdict()
            row["both_ms"] = both_ms[name]._asdict()
        if name in correct:
            row |= _memory(correct[name], x, forward[name], both[name])
        rows.append(row | _floor(x, forward_ms[CLONE]))
    return rows


def _errors(layers: Mapping[str, EmaAttn], case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """The error of each layer that ran; of the others, the first line of the exception."""
    errors, failed = {}, {}
    for name, layer in layers.items():
        try:
            own = case._replace(weights=layer.weights())
            errors[name] = error_of(lambda x, *_, layer=layer: layer(x), own)
        except Exception as error:  # compilers and drivers share no other class of errors
            failed[name] = first_line(error)
    return errors, failed


def _tolerance(variant: str, dtype: torch.dtype) -> float:
    """Ten times as much for the authors' code in half precision.

    There, the gradient of the 1×1 convolution's bias is mostly rounding error: over several random
    inputs it reached 6 times the tolerance.
    """
    is_noisy = variant.startswith(AUTHORS) and dtype != torch.float32
    return (10 if is_noisy else 1) * PARITY_TOLERANCE[dtype]


def _memory(layer: nn.Module, x: Tensor, forward: Callable, both: Callable) -> dict:
    parameters = list(layer.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "forward_peak_bytes": peak_extra_bytes(forward, x.device),
        "both_peak_bytes": peak_extra_bytes(both, x.device),
        "saved_bytes": saved_bytes(lambda: layer(x), [x, *parameters]),
    }


def _floor(x: Tensor, clone: Timing) -> dict:
    """The least time of any layer: the traffic of its maps at the speed of a copy.

    A clone reads and writes a map once. The forward does the same; the backward reads two maps
    and writes one.
    """
    return {
        "forward_floor_ms": clone.median,
        "both_floor_ms": clone.median * 5 / 2,
        "input_bytes": x.numel() * x.element_size(),
    }


class _Variant(NamedTuple):
    layer: nn.Module
    ema: bool


def _variants(case: Case, compiled: bool) -> dict[str, _Variant]:
    x = case.x
    channels = x.shape[1]
    dd = {"device": x.device, "dtype": x.dtype}
    first = EmaAttn(channels, groups=case.groups, **dd)
    with torch.no_grad():
        for parameter, value in zip(first.weights(), case.weights, strict=True):
            parameter.copy_(value)
    authors = AuthorsEmaAttn(channels, groups=case.groups, **dd)
    authors.load_state_dict(first.state_dict())
    variants = {AUTHORS: _Variant(authors, True)}
    if compiled and x.is_cuda:  # on a CPU, compiling takes minutes and makes this code slower
        variants[f"{AUTHORS}, compiled"] = _Variant(torch.compile(copy.deepcopy(authors)), True)
    for impl in IMPLEMENTATIONS:
        # On a CPU, "fused" runs in Triton's slow interpreter.
        if impl == "fused" and (not x.is_cuda or fused_unavailable(x, first.gn.weight)):
            continue
        layer = copy.deepcopy(first)
        layer.impl = impl
        variants[impl] = _Variant(layer, True)
    if compiled:
        variants["auto, compiled"] = _Variant(torch.compile(copy.deepcopy(first)), True)
    for name in OTHERS:
        variants[name] = _Variant(create_attn(name, channels, **dd), False)
    return variants


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        """Run one forward, without gradients."""
        with torch.inference_mode():
            return layer(x)

    return call


def _forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, upstream, allow_unused=True)
