"""``ema-timm bench model``: whole networks with and without attention, images a second."""

import torch

from ema_timm.bench.authors_form import AUTHORS, AuthorsForm
from ema_timm.bench.memory import peak_extra_bytes
from ema_timm.bench.networks import build, inference, training_step
from ema_timm.bench.parity import TOLERANCE, network_error
from ema_timm.bench.timing import Timing, machine, round_robin

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
