"""``ema-timm bench deploy``: exported networks in other runtimes, relative to the plain twin."""

import copy
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.bench.authors_code import AUTHORS, AuthorsForm
from ema_timm.bench.model import build
from ema_timm.bench.parity import TOLERANCE, by_definition
from ema_timm.bench.runtimes import (
    RUNTIMES,
    Loaded,
    load_runtime,
    missing_packages,
    require_runtime,
)
from ema_timm.bench.timing import machine, round_robin, unfinished
from ema_timm.errors import first_line

NETWORKS = ("resnet50", "mobilenetv2_100")
PLAIN, EMA, SE = "plain", "ema", "se"


def bench_deploy(
    networks: Sequence[str] = NETWORKS,
    runtimes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    size: int = 224,
    rounds: int = 11,
    progress: bool = True,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure exported networks: the plain one, with EMA, with SE, and with the authors' form.

    Times are seconds of this process on the CPU, so that what else runs counts less. The authors'
    form does not export with free sizes, and is measured at fixed ones.

    Args:
        networks: timm names with an EMA twin.
        runtimes: Keys of `RUNTIMES`; None is those that are installed, and the settings name the
            others.
        batches: Images in a batch.
        size: Height and width in pixels.
        rounds: Samples of each.
        progress: Show bars (on a terminal).
        keep: Called after each runtime with what there is by then.

    Returns:
        The machine, the settings and one row a network, runtime, batch and variant: time in ms,
        nodes that a layer adds to the plain network's graph. What a runtime did not take has its
        first line of complaint instead.
    """
    left_out = [name for name in RUNTIMES if runtimes is None and missing_packages(name)]
    runtimes = [r for r in runtimes or RUNTIMES if r not in left_out]
    for runtime in runtimes:
        require_runtime(runtime)
    settings = {"size": size, "rounds": rounds, "dtype": "float32", "clock": "process CPU time"}
    packages = [package for name in runtimes for package in RUNTIMES[name].packages]
    settings |= {package: version(package) for package in packages}
    if left_out:
        settings["not installed"] = ", ".join(left_out)
    result = {
        "bench": "deploy",
        "machine": machine(torch.device("cpu")),
        "settings": settings,
        "rows": [],
    }
    parts, done = len(networks) * len(batches) * len(runtimes) * 2, 0
    for network in networks:
        models = _variants(network)
        for batch in batches:
            torch.manual_seed(0)
            images = torch.randn(batch, 3, size, size)
            wanted = _wanted(models, images)
            for runtime in runtimes:
                for fixed in (False, True):
                    place = {
                        "network": network,
                        "runtime": runtime,
                        "sizes": "fixed" if fixed else "free",
                        "batch": batch,
                    }
                    here = {n: m for n, m in models.items() if fixed or n != AUTHORS}
                    found = _bench(here, runtime, images, fixed, wanted, rounds, progress)
                    result["rows"] += [place | row for row in found]
                    done += 1
                    keep(unfinished(result, done, parts))
    return result


def _variants(network: str) -> dict[str, nn.Module]:
    cpu = torch.device("cpu")
    ema = build(f"{network}_ema", {}, cpu).eval()
    variants = {PLAIN: build(network, {}, cpu).eval(), EMA: ema}
    variants[SE] = _with_layers(ema, lambda layer: create_attn("se", layer.channels))
    variants[AUTHORS] = _with_layers(ema, _authors)
    return variants


def _with_layers(model: nn.Module, make) -> nn.Module:
    """A copy with ``make(layer)`` in the place of every EMA layer."""
    model = copy.deepcopy(model)
    for name, layer in [(k, m) for k, m in model.named_modules() if isinstance(m, EmaAttn)]:
        model.set_submodule(name, make(layer))
    return model.eval()


def _authors(layer: EmaAttn) -> AuthorsForm:
    form = AuthorsForm(layer.channels, layer.groups)
    form.load_state_dict(layer.state_dict())
    return form


def _wanted(models: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Logits in PyTorch, those of EMA by definition."""
    with torch.no_grad():
        wanted = {name: models[name](images) for name in (PLAIN, SE)}
        with by_definition(models[EMA]):
            wanted[EMA] = wanted[AUTHORS] = models[EMA](images)
    return wanted


def _bench(
    models: dict[str, nn.Module],
    runtime: str,
    images: Tensor,
    fixed: bool,
    wanted: dict[str, Tensor],
    rounds: int,
    progress: bool,
) -> list[dict]:
    loaded: dict[str, Loaded] = {}
    errors, failed = {}, {}
    with torch.no_grad():
        for name, model in models.items():
            try:
                found = load_runtime(runtime, model, images, fixed)
                errors[name] = _error(found.call(images), wanted[name])
            except Exception as error:  # the runtimes' errors have nothing else in common
                failed[name] = first_line(error)
            else:
                loaded[name] = found
        sound = {n: f for n, f in loaded.items() if errors[n] <= TOLERANCE[torch.float32]}
        calls = {name: (lambda call=found.call: call(images)) for name, found in sound.items()}
        label = f"{runtime}, {'fixed' if fixed else 'free'}"
        times = round_robin(calls, rounds, images.device, label, progress, time.process_time)
    layers = sum(isinstance(m, EmaAttn) for m in models[EMA].modules())
    rows = []
    for name in models:
        row = {"variant": name, "error": errors.get(name), "parity": name in sound}
        if name in failed:
            row["failed"] = failed[name]
        elif name != PLAIN and PLAIN in loaded:
            row["nodes_per_layer"] = (loaded[name].nodes - loaded[PLAIN].nodes) / layers
        if name in times:
            row["inference_ms"] = times[name]._asdict()
        rows.append(row)
    return rows


def _error(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())
