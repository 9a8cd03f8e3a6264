"""``ema-timm bench gpu``: what is measured on a GPU, in one go, to be sent as one file."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.layer import SHAPES, bench_layer
from ema_timm.bench.model import NETWORKS, bench_model
from ema_timm.bench.timing import machine, unfinished
from ema_timm.environment import environment
from ema_timm.errors import UserError, first_line

LAYERS = (("bfloat16", True), ("bfloat16", False), ("float32", False))
"""Type and whether channels_last, of the layers."""

MODELS = (
    "resnet50",
    "resnet50_ema",
    f"resnet50, {AUTHORS}",
    "mobilenetv2_100",
    "mobilenetv2_100_ema",
)
"""Networks: plain, with EMA attention, and with it as its authors arranged it."""


def bench_gpu(
    device: str = "cuda",
    batch: int = 64,
    size: int = 224,
    rounds: int = 7,
    compiled: bool = True,
    progress: bool = True,
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    networks: dict[str, tuple[str, dict]] | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure layers and networks, with parity before any time.

    TF32 is switched off meanwhile, so that float32 is compared with float32. A part that cannot be
    measured (a GPU out of memory, a compiler that fails) says so in one line; the others follow.

    Args:
        device: Where to run; "cpu" is for trying the command.
        batch: Images.
        size: Height and width in pixels of the networks' images.
        rounds: Samples of each.
        compiled: Measure under ``torch.compile`` too.
        progress: Show bars (on a terminal).
        shapes: (C, H, W) of the layers' maps, by name.
        networks: timm name and arguments, by name; None takes `MODELS`.
        keep: Called after each part with what there is by then.

    Returns:
        The machine with what runs on it, the settings, ``parts``, each a measurement of its own or
        why there is none, and ``rows`` with the parity of all.

    Raises:
        UserError: If there is no such GPU.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench gpu measures a GPU, and PyTorch finds none here. `ema-timm bench bytes` counts "
            "without one; --device cpu tries the command."
        )
    if networks is None:
        networks = {name: NETWORKS[name] for name in MODELS}
    shared = {"batch": batch, "rounds": rounds, "device": device, "progress": progress}
    wanted = [
        partial(bench_layer, shapes, dtype=t, channels_last=last, compiled=compiled, **shared)
        for t, last in LAYERS
    ] + [
        partial(bench_model, networks, size=size, amp=True, channels_last=last, **shared)
        for last in (True, False)
    ]
    result = {
        "bench": "gpu",
        "machine": machine(where) | {"environment": environment()},
        "settings": {"batch": batch, "size": size, "rounds": rounds, "TF32": False},
        "parts": [],
        "rows": [],
    }
    with _without_tf32():
        for number, measure in enumerate(wanted, 1):
            part = _measured(measure)
            result["parts"].append(part)
            result["rows"] += [_parity(part, row) for row in part["rows"] if "parity" in row]
            if "failed" in part:
                place = {"place": "all of it", "error": None, "parity": False}
                result["rows"].append(_parity(part, place))
            if number < len(wanted):
                keep(unfinished(result, number, len(wanted)))
    return result


def _measured(measure: partial) -> dict:
    """A part, or what it was to be and the first line of why it is not."""
    try:
        return measure()
    except Exception as error:  # compilers' and drivers' errors have nothing else in common
        given = measure.keywords
        settings = {"dtype": given.get("dtype", "amp"), "batch": given["batch"]}
        settings["memory_format"] = "channels_last" if given["channels_last"] else "contiguous"
        kind = measure.func.__name__.removeprefix("bench_")
        return {"bench": kind, "settings": settings, "rows": [], "failed": first_line(error)}


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def _parity(part: dict, row: dict) -> dict:
    place = row.get("place", row.get("network"))
    settings = part["settings"]
    return {
        "part": f"{part['bench']}, {settings.get('dtype', 'amp')}, {settings['memory_format']}",
        "place": place,
        "variant": row.get("variant", "network"),
        "error": row.get("error"),
        "parity": row["parity"],
    }
