"""``ema-timm bench model``: whole networks with and without attention, images a second."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

from ema_timm.attention import EmaAttn, set_implementation
from ema_timm.bench.layer import AUTHORS, TOLERANCE, AuthorsForm
from ema_timm.bench.memory import peak_extra_bytes
from ema_timm.bench.timing import machine, round_robin
from ema_timm.ops import ema_attention

NETWORKS = {
    "resnet50": ("resnet50", {}),
    "resnet50_ema": ("resnet50_ema", {}),
    "seresnet50": ("seresnet50", {}),
    "resnet50, cbam": ("resnet50", {"block_args": {"attn_layer": "cbam"}}),
    "resnet50, coord": ("resnet50", {"block_args": {"attn_layer": "coord"}}),
    f"resnet50, {AUTHORS}": ("resnet50", {"block_args": {"attn_layer": AuthorsForm}}),
    "mobilenetv2_100": ("mobilenetv2_100", {}),
    "mobilenetv2_100_ema": ("mobilenetv2_100_ema", {}),
}
"""timm name and arguments, by the name in the table."""

RESOLUTIONS = (224, 448, 672, 896, 1120, 1344)


def bench_model(
    networks: dict[str, tuple[str, dict]] = NETWORKS,
    batch: int = 8,
    size: int = 224,
    rounds: int = 5,
    device: str = "cpu",
    amp: bool = False,
    channels_last: bool = False,
    impl: str = "auto",
    progress: bool = True,
) -> dict:
    """Measure inference and a training step of every network.

    Args:
        networks: timm name and arguments, by name.
        batch: Images in a batch.
        size: Height and width in pixels.
        rounds: Samples of each.
        device: Where to run.
        amp: bfloat16 mixed precision.
        channels_last: Memory format.
        impl: Who computes the EMA layers.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row a network: images a second, time in ms, and on a
        GPU the peak memory of a training step in bytes.
    """
    where = torch.device(device)
    models = {n: _build(*spec, where, channels_last) for n, spec in networks.items()}
    if impl != "auto":
        for model in models.values():
            if any(isinstance(m, EmaAttn) for m in model.modules()):
                set_implementation(model, impl)
    images = torch.randn(batch, 3, size, size, device=where)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    errors = {n: error for n, m in models.items() if (error := parity(m, images[:2])) is not None}
    sound = {n: m for n, m in models.items() if errors.get(n, 0) <= TOLERANCE[torch.float32]}
    inference = {n: _inference(m, images, amp) for n, m in sound.items()}
    times = {"inference": round_robin(inference, rounds, where, "inference", progress)}
    training = {n: _training_step(m, images, amp) for n, m in sound.items()}
    times["training"] = round_robin(training, rounds, where, "training step", progress)
    rows = []
    for name, model in models.items():
        row = {"network": name, "parameters": sum(p.numel() for p in model.parameters())}
        if name in errors:
            row |= {"error": errors[name], "parity": name in sound}
        if name in sound:
            for kind in times:
                timing = times[kind][name]
                row[f"{kind}_ms"] = timing._asdict()
                row[f"{kind}_images_per_s"] = 1e3 * batch / timing.median
            if where.type == "cuda":
                row["training_peak_bytes"] = peak_extra_bytes(training[name], where)
        rows.append(row)
    settings = {"batch": batch, "size": size, "amp": amp, "rounds": rounds}
    settings["memory_format"] = "channels_last" if channels_last else "contiguous"
    if impl != "auto":
        settings["impl"] = impl
    return {"bench": "model", "machine": machine(where), "settings": settings, "rows": rows}


def bench_resolution(
    sizes: tuple[int, ...] = RESOLUTIONS,
    names: tuple[str, ...] = ("resnet50", "resnet50_ema"),
    batch: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Measure how the cost of inference grows with the image.

    Args:
        sizes: Heights and widths in pixels.
        names: timm names; the first is what the others are compared with.
        batch: Images in a batch.
        rounds: Samples of each.
        device: Where to run.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row a size and network.
    """
    where = torch.device(device)
    models = {name: _build(name, {}, where, False) for name in names}
    rows = []
    for size in sizes:
        images = torch.randn(batch, 3, size, size, device=where)
        calls = {name: _inference(model, images, False) for name, model in models.items()}
        times = round_robin(calls, rounds, where, f"{size} px", progress)
        for name, timing in times.items():
            rows.append({"network": name, "size": size, "inference_ms": timing._asdict()})
    settings = {"batch": batch, "rounds": rounds}
    return {"bench": "resolution", "machine": machine(where), "settings": settings, "rows": rows}


def _build(name: str, kwargs: dict, device: torch.device, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).to(device)
    with torch.no_grad():  # timm zeroes the last norms, and attention of a zero map is no work
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@torch.no_grad()
def parity(model: nn.Module, images: torch.Tensor) -> float | None:
    """Relative difference of the logits with every EMA layer by definition; None without any."""
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    if not layers:
        return None
    model.eval()
    out = model(images)
    # AuthorsForm is an EmaAttn that computes otherwise: the definition is forced on it as well.
    for layer in layers:
        layer.forward = partial(_by_definition, layer)
    want = model(images)
    for layer in layers:
        del layer.forward
    return float((out - want).norm() / want.norm())


def _by_definition(layer: EmaAttn, x: torch.Tensor) -> torch.Tensor:
    return ema_attention(x, layer.weights(), layer.groups, impl="reference")


def _inference(model: nn.Module, images: torch.Tensor, amp: bool) -> Callable[[], object]:
    def call() -> object:
        model.eval()
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, amp):
            return model(images)

    return call


def _training_step(model: nn.Module, images: torch.Tensor, amp: bool) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    targets = torch.arange(len(images), device=images.device)

    def call() -> None:
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16, amp):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call
