"""``ema-timm bench layer``: one attention layer beside timm's others and the cost of a copy."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.bench.authors_code import AUTHORS, AuthorsForm
from ema_timm.bench.parity import PUBLISHED_TOLERANCE, TOLERANCE, layer_errors
from ema_timm.bench.timing import Timing, machine, peak_extra_bytes, round_robin, saved_bytes
from ema_timm.ops import IMPLEMENTATIONS
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
"""Feature maps that EMA attention sees in the networks at 224 px: (C, H, W)."""

PEERS = ("se", "eca", "cbam", "coord", "gc", "ela")
FLOOR = "clone"


def bench_layer(
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    batch: int = 8,
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
        batch: B.
        rounds: Samples of each variant.
        device: Where to run.
        dtype: float32, bfloat16 or float16.
        channels_last: Memory format of the input.
        compiled: Measure the default implementation under ``torch.compile`` too.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row a variant and shape. Times in ms, memory in bytes.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    rows = []
    for place, (channels, height, width) in shapes.items():
        torch.manual_seed(0)
        x = torch.randn(batch, channels, height, width).to(where, kind)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        rows += _bench_shape(place, x, rounds, compiled, progress)
    return {
        "bench": "layer",
        "machine": machine(where),
        "settings": {
            "batch": batch,
            "dtype": dtype,
            "memory_format": "channels_last" if channels_last else "contiguous",
            "rounds": rounds,
        },
        "rows": rows,
    }


def _bench_shape(place: str, x: Tensor, rounds: int, compiled: bool, progress: bool) -> list[dict]:
    variants = _variants(x, compiled)
    upstream = torch.randn_like(x)
    ema = {n: v.layer for n, v in variants.items() if v.ema}
    errors, failed = layer_errors(ema, x, upstream)
    agreed = {n for n, e in errors.items() if e <= _tolerance(n, x.dtype)}
    sound = {n: v for n, v in variants.items() if n in agreed or not v.ema}
    device = x.device

    forward = {n: _forward(v.layer, x) for n, v in sound.items()}
    both = {n: _forward_backward(v.layer, x, upstream) for n, v in sound.items()}
    forward[FLOOR] = both[FLOOR] = x.detach().clone
    label = f"{place} {tuple(x.shape)}"
    forward_ms = round_robin(forward, rounds, device, f"{label} forward", progress)
    both_ms = round_robin(both, rounds, device, f"{label} forward + backward", progress)
    rows = []
    for name in [*variants, FLOOR]:
        row = {"place": place, "shape": list(x.shape), "variant": name}
        if name in errors:
            row |= {"error": errors[name], "parity": name in sound}
        if name in failed:
            row |= {"parity": False, "failed": failed[name]}
        if name in forward:
            row["forward_ms"] = forward_ms[name]._asdict()
            row["both_ms"] = both_ms[name]._asdict()
        if name in sound:
            row |= _memory(variants[name].layer, x, forward[name], both[name])
        rows.append(row | _floor(x, forward_ms[FLOOR]))
    return rows


def _tolerance(variant: str, dtype: torch.dtype) -> float:
    return (PUBLISHED_TOLERANCE if variant.startswith(AUTHORS) else TOLERANCE)[dtype]


def _memory(layer: nn.Module, x: Tensor, forward: Callable, both: Callable) -> dict:
    parameters = list(layer.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "forward_peak_bytes": peak_extra_bytes(forward, x.device),
        "both_peak_bytes": peak_extra_bytes(both, x.device),
        "saved_bytes": saved_bytes(lambda: layer(x), [x, *parameters]),
    }


def _floor(x: Tensor, clone: Timing) -> dict:
    """The least that any layer takes: the traffic of its maps at the speed of a copy.

    A clone reads and writes once: two units. The forward needs two, the backward three more.
    """
    return {
        "forward_floor_ms": clone.median,
        "both_floor_ms": clone.median * 5 / 2,
        "input_bytes": x.numel() * x.element_size(),
    }


class _Variant(NamedTuple):
    layer: nn.Module
    ema: bool


def _variants(x: Tensor, compiled: bool) -> dict[str, _Variant]:
    channels = x.shape[1]
    dd = {"device": x.device, "dtype": x.dtype}
    groups = largest_group_count(channels)
    first = EmaAttn(channels, groups, **dd)
    with torch.no_grad():
        for parameter in first.parameters():  # away from special values, such as γ = 1, β = 0
            parameter += 0.1 * torch.randn_like(parameter)
    authors = AuthorsForm(channels, groups, **dd)
    authors.load_state_dict(first.state_dict())
    variants = {AUTHORS: _Variant(authors, True)}
    if compiled and x.is_cuda:  # on a CPU Inductor makes this form slower, and takes minutes
        variants[f"{AUTHORS}, compiled"] = _Variant(torch.compile(copy.deepcopy(authors)), True)
    for impl in IMPLEMENTATIONS:
        # Triton's interpreter also runs "fused" on a CPU, but that is no time to measure.
        if impl == "fused" and (not x.is_cuda or fused_unavailable(x, first.gn.weight)):
            continue
        layer = copy.deepcopy(first)
        layer.impl = impl
        variants[impl] = _Variant(layer, True)
    if compiled:
        variants["auto, compiled"] = _Variant(torch.compile(copy.deepcopy(first)), True)
    for name in PEERS:
        variants[name] = _Variant(create_attn(name, channels, **dd), False)
    return variants


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        """One forward, without gradients."""
        with torch.inference_mode():
            return layer(x)

    return call


def _forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, upstream, allow_unused=True)
