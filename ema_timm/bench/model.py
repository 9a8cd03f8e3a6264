"""``ema-timm bench model``: images per second of whole networks, with and without attention."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, set_implementation
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.parity import PARITY_TOLERANCE, network_error
from ema_timm.bench.timing import Clock, Timing, peak_extra_bytes, round_robin
from ema_timm.environment import machine

BASELINES = ("resnet50", "mobilenetv2_100")
"""timm names of networks without EMA layers; each has a variant NAME_ema."""

NETWORKS = {
    "resnet50": ("resnet50", {}),
    "resnet50_ema": ("resnet50_ema", {}),
    "seresnet50": ("seresnet50", {}),
    "resnet50, cbam": ("resnet50", {"block_args": {"attn_layer": "cbam"}}),
    "resnet50, coord": ("resnet50", {"block_args": {"attn_layer": "coord"}}),
    f"resnet50, {AUTHORS}": ("resnet50", {"block_args": {"attn_layer": AuthorsEmaAttn}}),
    "mobilenetv2_100": ("mobilenetv2_100", {}),
    "mobilenetv2_100_ema": ("mobilenetv2_100_ema", {}),
}
"""timm name and arguments, by the name in the table."""

RESOLUTIONS = (224, 448, 672, 896, 1120, 1344)


def bench_model(
    networks: dict[str, tuple[str, dict]] = NETWORKS,
    batch_size: int = 8,
    img_size: int = 224,
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
        batch_size: Images in a batch.
        img_size: Height and width in pixels.
        rounds: Samples of each.
        device: Where to run.
        amp: Use bfloat16 mixed precision.
        channels_last: Use channels-last memory format.
        impl: Implementation of the EMA layers.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row per network: images per second, time in ms, and on a
        GPU the peak memory of a training step in bytes.
    """
    where = torch.device(device)
    models = {n: build(*spec, where, channels_last, impl) for n, spec in networks.items()}
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    errors = {n: e for n, m in models.items() if (e := network_error(m, images[:2])) is not None}
    limit = PARITY_TOLERANCE[torch.float32]
    correct = {n: m for n, m in models.items() if errors.get(n, 0) <= limit}

    clock = Clock(where)
    infer = {n: inference(m, images, amp) for n, m in correct.items()}
    times = {"inference": round_robin(infer, rounds, clock, "inference", progress)}
    train = {n: training_step(m, images, amp) for n, m in correct.items()}
    times["training"] = round_robin(train, rounds, clock, "training step", progress)
    rows = []
    for name, model in models.items():
        row = {"network": name, "parameters": sum(p.numel() for p in model.parameters())}
        if name in errors:
            row |= {"error": errors[name], "parity": name in correct}
        if name in correct:
            row |= _speed({kind: times[kind][name] for kind in times}, batch_size)
            if where.type == "cuda":
                row["training_peak_bytes"] = peak_extra_bytes(train[name], where)
        rows.append(row)
    settings = {"batch": batch_size, "size": img_size, "amp": amp, "rounds": rounds}
    settings["memory_format"] = "channels_last" if channels_last else "contiguous"
    if impl != "auto":
        settings["impl"] = impl
    return {"bench": "model", "machine": machine(where), "settings": settings, "rows": rows}


def bench_resolution(
    img_sizes: tuple[int, ...] = RESOLUTIONS,
    names: tuple[str, ...] = ("resnet50", "resnet50_ema"),
    batch_size: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Measure how the time of inference grows with the image, for ``bench model --resolution``.

    Args:
        img_sizes: Heights and widths in pixels.
        names: timm names; the others are compared with the first.
        batch_size: Images in a batch.
        rounds: Samples of each.
        device: Where to run.
        progress: Show bars (on a terminal).

    Returns:
        The machine, the settings and one row per size and network.
    """
    where = torch.device(device)
    models = {name: build(name, {}, where) for name in names}
    rows = []
    for size in img_sizes:
        images = torch.randn(batch_size, 3, size, size, device=where)
        calls = {name: inference(model, images) for name, model in models.items()}
        times = round_robin(calls, rounds, Clock(where), f"{size} px", progress)
        for name, timing in times.items():
            rows.append({"network": name, "size": size, "inference_ms": timing._asdict()})
    settings = {"batch": batch_size, "rounds": rounds}
    return {"bench": "resolution", "machine": machine(where), "settings": settings, "rows": rows}


def build(
    name: str,
    arguments: dict,
    device: torch.device,
    channels_last: bool = False,
    impl: str = "auto",
) -> nn.Module:
    """A timm network whose attention layers do not see maps of zeros.

    Args:
        name: timm name.
        arguments: Arguments of ``timm.create_model``.
        device: Where to make it.
        channels_last: Use channels-last memory format.
        impl: Implementation of the EMA layers.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).to(device)
    with torch.no_grad():  # timm initialises the last norm of a block to 0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if impl != "auto" and any(isinstance(module, EmaAttn) for module in model.modules()):
        set_implementation(model, impl)
    return model


def inference(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call of ``model`` on ``images``; ``amp``: in bfloat16 mixed precision."""

    def call() -> object:
        """Infer one batch, without gradients."""
        model.eval()
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, amp):
            return model(images)

    return call


def training_step(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call that trains on ``images``; ``amp``: in bfloat16 mixed precision."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    targets = torch.arange(len(images), device=images.device)

    def call() -> None:
        """Run forward, loss, backward and a step of the optimiser."""
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16, amp):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def _speed(times: dict[str, Timing], batch_size: int) -> dict:
    row = {}
    for kind, timing in times.items():
        row[f"{kind}_ms"] = timing._asdict()
        row[f"{kind}_images_per_s"] = 1e3 * batch_size / timing.median
    return row
