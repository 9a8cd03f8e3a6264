"""``ema-timm bench model``: whole networks with and without attention, images a second."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, set_implementation
from ema_timm.bench.authors_code import AUTHORS, AuthorsForm
from ema_timm.bench.parity import TOLERANCE, network_error
from ema_timm.bench.timing import Timing, machine, peak_extra_bytes, round_robin

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
    models = {n: build(*spec, where, channels_last, impl) for n, spec in networks.items()}
    images = torch.randn(batch, 3, size, size, device=where)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    errors = {n: e for n, m in models.items() if (e := network_error(m, images[:2])) is not None}
    sound = {n: m for n, m in models.items() if errors.get(n, 0) <= TOLERANCE[torch.float32]}

    infer = {n: inference(m, images, amp) for n, m in sound.items()}
    times = {"inference": round_robin(infer, rounds, where, "inference", progress)}
    train = {n: training_step(m, images, amp) for n, m in sound.items()}
    times["training"] = round_robin(train, rounds, where, "training step", progress)
    rows = []
    for name, model in models.items():
        row = {"network": name, "parameters": sum(p.numel() for p in model.parameters())}
        if name in errors:
            row |= {"error": errors[name], "parity": name in sound}
        if name in sound:
            row |= _speed({kind: times[kind][name] for kind in times}, batch)
            if where.type == "cuda":
                row["training_peak_bytes"] = peak_extra_bytes(train[name], where)
        rows.append(row)
    settings = {"batch": batch, "size": size, "amp": amp, "rounds": rounds}
    settings["memory_format"] = "channels_last" if channels_last else "contiguous"
    if impl != "auto":
        settings["impl"] = impl
    return {"bench": "model", "machine": machine(where), "settings": settings, "rows": rows}


def _speed(times: dict[str, Timing], batch: int) -> dict:
    row = {}
    for kind, timing in times.items():
        row[f"{kind}_ms"] = timing._asdict()
        row[f"{kind}_images_per_s"] = 1e3 * batch / timing.median
    return row


# MERGED: Whole networks to measure, and their calls: an inference, a training step.
def build(
    name: str,
    arguments: dict,
    device: torch.device,
    channels_last: bool = False,
    impl: str = "auto",
) -> nn.Module:
    """A timm network with weights under which attention has work to do.

    Args:
        name: timm name.
        arguments: Of ``timm.create_model``.
        device: Where to.
        channels_last: Memory format.
        impl: Who computes the EMA layers.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).to(device)
    with torch.no_grad():  # timm zeroes the last norms, and attention of a zero map is no work
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if impl != "auto" and any(isinstance(module, EmaAttn) for module in model.modules()):
        set_implementation(model, impl)
    return model


def inference(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call that infers ``images``; ``amp``: in bfloat16 mixed precision."""

    def call() -> object:
        """One batch, without gradients."""
        model.eval()
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, amp):
            return model(images)

    return call


def training_step(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call that trains on ``images``; ``amp``: in bfloat16 mixed precision."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    targets = torch.arange(len(images), device=images.device)

    def call() -> None:
        """Forward, loss, backward and a step of the optimiser."""
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16, amp):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


# MERGED: ``ema-timm bench model --resolution``: how inference grows with the image.
RESOLUTIONS = (224, 448, 672, 896, 1120, 1344)


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
    models = {name: build(name, {}, where) for name in names}
    rows = []
    for size in sizes:
        images = torch.randn(batch, 3, size, size, device=where)
        calls = {name: inference(model, images) for name, model in models.items()}
        times = round_robin(calls, rounds, where, f"{size} px", progress)
        for name, timing in times.items():
            rows.append({"network": name, "size": size, "inference_ms": timing._asdict()})
    settings = {"batch": batch, "rounds": rounds}
    return {"bench": "resolution", "machine": machine(where), "settings": settings, "rows": rows}
