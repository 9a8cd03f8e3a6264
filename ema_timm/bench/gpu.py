"""``ema-timm bench gpu``: all measurements on a GPU in one command, with one file as the result.

Experimental: not run on a GPU yet.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.layer import SHAPES, bench_layer
from ema_timm.bench.model import NETWORKS, bench_model
from ema_timm.bench.timing import unfinished
from ema_timm.environment import environment, machine
from ema_timm.errors import UserError, first_line

LAYERS = (("bfloat16", True), ("bfloat16", False), ("float32", False))
"""Of the layers: dtype, and whether the memory format is channels-last."""

MODELS = (
    "resnet50",
    "resnet50_ema",
    f"resnet50, {AUTHORS}",
    "mobilenetv2_100",
    "mobilenetv2_100_ema",
)
"""Keys of `NETWORKS`."""


def bench_gpu(
    device: str = "cuda",
    batch_size: int = 64,
    img_size: int = 224,
    rounds: int = 7,
    compiled: bool = True,
    progress: bool = True,
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    networks: dict[str, tuple[str, dict]] | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Check the parity of layers and networks on a GPU, and measure them.

    TF32 is disabled meanwhile, so that float32 is compared with float32. If a part cannot be
    measured (out of memory, a compiler error), its error is recorded and the next part follows.
    Experimental: not run on a GPU yet.

    Args:
        device: Where to run; "cpu" is for trying the command.
        batch_size: Images in a batch.
        img_size: Height and width in pixels of the networks' images.
        rounds: Samples of each.
        compiled: Measure under ``torch.compile`` too.
        progress: Show bars (on a terminal).
        shapes: (C, H, W) of the layers' maps, by name.
        networks: timm name and arguments, by name; None uses `MODELS`.
        keep: Called after each part with the result so far.

    Returns:
        The machine and its environment, the settings, ``parts`` (each a measurement, or its
        error), and ``rows`` with the parity of all.

    Raises:
        UserError: If PyTorch finds no GPU.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench gpu needs a GPU, but PyTorch finds none here. `ema-timm bench bytes` counts "
            "bytes without a GPU; --device cpu tries the command."
        )
    shared = {"batch_size": batch_size, "rounds": rounds, "device": device, "progress": progress}
    layer = partial(bench_layer, shapes, compiled=compiled, **shared)
    networks = networks or {name: NETWORKS[name] for name in MODELS}
    model = partial(bench_model, networks, img_size=img_size, amp=True, **shared)
    parts = [partial(layer, dtype=dtype, channels_last=last) for dtype, last in LAYERS]
    parts += [partial(model, channels_last=last) for last in (True, False)]
    settings = {"batch": batch_size, "size": img_size, "rounds": rounds, "TF32": False}
    here = machine(where) | {"environment": environment()}
    result = {"bench": "gpu", "machine": here, "settings": settings, "parts": [], "rows": []}
    with _without_tf32():
        for number, measure in enumerate(parts, 1):
            part = _measured(measure)
            result["parts"].append(part)
            result["rows"] += _parity(part)
            if number < len(parts):
                keep(unfinished(result, number, len(parts)))
    return result


def _measured(measure: partial) -> dict:
    """A part, or its settings and the first line of the exception."""
    try:
        return measure()
    except Exception as error:  # compilers and drivers share no other class of errors
        given = measure.keywords
        settings = {"dtype": given.get("dtype", "amp"), "batch": given["batch_size"]}
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


def _parity(part: dict) -> list[dict]:
    """The parity of each row of a part; one row that says so if the part failed."""
    rows = [row for row in part["rows"] if "parity" in row]
    if "failed" in part:
        rows = [{"place": "all of it", "parity": False}]
    settings = part["settings"]
    name = f"{part['bench']}, {settings.get('dtype', 'amp')}, {settings['memory_format']}"
    return [
        {
            "part": name,
            "place": row.get("place", row.get("network")),
            "variant": row.get("variant", "network"),
            "error": row.get("error"),
            "parity": row["parity"],
        }
        for row in rows
    ]
