"""``ema-timm bench model --resolution``: how inference grows with the image."""

import torch

from ema_timm.bench.networks import build, inference
from ema_timm.bench.timing import machine, round_robin

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
