"""``ema-timm bench layer``: one attention layer beside timm's others and the cost of a copy."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import create_attn
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.bench.memory import peak_extra_bytes, saved_bytes
from ema_timm.bench.timing import Timing, machine, round_robin
from ema_timm.ops import IMPLEMENTATIONS
from ema_timm.ops.dispatch import fused_unavailable

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
AUTHORS = "authors' form"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error against the float64 reference: output and gradients, in norm."""


class AuthorsForm(EmaAttn):
    """The paper's module as its authors arranged it, of library layers: what people paste.

    Pools with AdaptiveAvgPool2d, folds groups into the batch, convolves all channels, normalises
    with GroupNorm, and weighs maps by batched products. For comparison only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (B, C, H, W)."""
        batch, channels, height, width = x.shape
        n = channels // self.groups
        g = x.reshape(batch * self.groups, n, height, width)
        rows = F.adaptive_avg_pool2d(g, (None, 1))
        cols = F.adaptive_avg_pool2d(g, (1, None)).permute(0, 1, 3, 2)
        gate_h, gate_w = self.conv1x1(torch.cat([rows, cols], 2)).split([height, width], 2)
        x1 = self.gn(g * gate_h.sigmoid() * gate_w.permute(0, 1, 3, 2).sigmoid())
        x2 = self.conv3x3(g)
        v, u = (F.adaptive_avg_pool2d(t, 1).reshape(-1, 1, n).softmax(-1) for t in (x1, x2))
        flat = (t.reshape(-1, n, height * width) for t in (x2, x1))
        logits = sum(a @ t for a, t in zip((v, u), flat, strict=True))
        gate = logits.reshape(-1, 1, height, width).sigmoid()
        return (g * gate).reshape(batch, channels, height, width)


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
    errors = _parity({n: v for n, v in variants.items() if v.ema}, x, upstream)
    sound = {n: v for n, v in variants.items() if errors.get(n, 0) <= TOLERANCE[x.dtype]}
    device = x.device

    forward = {n: _forward(v.layer, x) for n, v in sound.items()}
    both = {n: _forward_backward(v.layer, x, upstream) for n, v in sound.items()}
    forward[FLOOR] = both[FLOOR] = x.detach().clone
    label = f"{place} {tuple(x.shape)}"
    times = {
        "forward": round_robin(forward, rounds, device, f"{label} forward", progress),
        "both": round_robin(both, rounds, device, f"{label} forward + backward", progress),
    }
    rows = []
    for name in [*variants, FLOOR]:
        row = {"place": place, "shape": list(x.shape), "variant": name}
        if name in errors:
            row["error"] = errors[name]
            row["parity"] = name in sound
        if name in forward:
            row["forward_ms"] = times["forward"][name]._asdict()
            row["both_ms"] = times["both"][name]._asdict()
        if name in sound:
            layer = variants[name].layer
            parameters = list(layer.parameters())
            row["parameters"] = sum(p.numel() for p in parameters)
            row["forward_peak_bytes"] = peak_extra_bytes(forward[name], device)
            row["both_peak_bytes"] = peak_extra_bytes(both[name], device)
            row["saved_bytes"] = saved_bytes(lambda f=layer: f(x), [x, *parameters])
        rows.append(row)
    # A clone reads and writes once: two units. The forward needs two, the backward three more.
    clone: Timing = times["forward"][FLOOR]
    for row in rows:
        row["forward_floor_ms"] = clone.median
        row["both_floor_ms"] = clone.median * 5 / 2
        row["input_bytes"] = x.numel() * x.element_size()
    return rows


class _Variant:
    def __init__(self, layer: nn.Module, ema: bool):
        self.layer = layer
        self.ema = ema


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


def _parity(variants: dict[str, _Variant], x: Tensor, upstream: Tensor) -> dict[str, float]:
    """Largest relative error of output and gradients against the float64 reference."""
    oracle = EmaAttn(x.shape[1], largest_group_count(x.shape[1])).double().to(x.device)
    first = next(iter(variants.values())).layer
    oracle.load_state_dict(first.state_dict())
    oracle.impl = "reference"
    exact = x.detach().double().requires_grad_()
    out = oracle(exact)
    parameters = list(oracle.parameters())
    wanted = [out.detach(), *torch.autograd.grad(out, [exact, *parameters], upstream.double())]
    errors = {}
    for name, variant in variants.items():
        out = variant.layer(x)
        inputs = [x, *variant.layer.parameters()]
        gradients = torch.autograd.grad(out, inputs, upstream, materialize_grads=True)
        found = [out.detach(), *gradients]
        errors[name] = max(
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(found, wanted, strict=True)
        )
    return errors


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            return layer(x)

    return call


def _forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, upstream, allow_unused=True)
