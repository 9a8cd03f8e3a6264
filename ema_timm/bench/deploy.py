"""``ema-timm bench deploy``: exported networks in other runtimes, compared with the baseline."""

import copy
import itertools
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.model import BASELINES, build
from ema_timm.bench.parity import PARITY_TOLERANCE, in_reference, relative_error
from ema_timm.bench.runtimes import (
    RUNTIMES,
    Loaded,
    load_runtime,
    missing_packages,
    require_runtime,
)
from ema_timm.bench.timing import Clock, round_robin, unfinished
from ema_timm.environment import machine
from ema_timm.errors import first_line

PLAIN, EMA, SE = "plain", "ema", "se"


def bench_deploy(
    networks: Sequence[str] = BASELINES,
    runtimes: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    img_size: int = 224,
    rounds: int = 11,
    progress: bool = True,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure exported networks: the baseline, with EMA, with SE, and with the authors' code.

    Times are CPU time of this process, so that other processes matter less. The authors' code
    cannot be exported with dynamic sizes, and is measured only with fixed ones.

    Args:
        networks: timm names of baselines; each needs a variant NAME_ema.
        runtimes: Keys of `RUNTIMES`; None uses those that are installed, and the settings name the
            others.
        batch_sizes: Images in a batch.
        img_size: Height and width in pixels.
        rounds: Samples of each.
        progress: Show bars (on a terminal).
        keep: Called after each runtime with the result so far.

    Returns:
        The machine, the settings and one row per network, runtime, batch size and variant: time in
        ms, and how many nodes a layer adds to the baseline's graph. If a runtime cannot load or
        run a network, its row has the first line of the exception instead.
    """
    missing = [name for name in RUNTIMES if runtimes is None and missing_packages(name)]
    runtimes = [r for r in runtimes or RUNTIMES if r not in missing]
    for runtime in runtimes:
        require_runtime(runtime)
    settings = {"size": img_size, "rounds": rounds, "dtype": "float32", "clock": "process CPU time"}
    settings |= {p: version(p) for name in runtimes for p in RUNTIMES[name].packages}
    if missing:
        settings["not installed"] = ", ".join(missing)
    here = machine(torch.device("cpu"))
    result = {"bench": "deploy", "machine": here, "settings": settings, "rows": []}
    parts, done = len(networks) * len(batch_sizes) * len(runtimes) * 2, 0
    for network in networks:
        models = _variants(network)
        for batch in batch_sizes:
            torch.manual_seed(0)
            images = torch.randn(batch, 3, img_size, img_size)
            exact = _exact(models, images)
            for runtime, fixed in itertools.product(runtimes, (False, True)):
                sizes = "fixed" if fixed else "free"
                place = {"network": network, "runtime": runtime, "sizes": sizes, "batch": batch}
                exported = {n: m for n, m in models.items() if fixed or n != AUTHORS}
                found = _bench(exported, runtime, images, fixed, exact, rounds, progress)
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


def _with_layers(model: nn.Module, make: Callable[[EmaAttn], nn.Module]) -> nn.Module:
    """A copy with ``make(layer)`` in the place of every EMA layer."""
    model = copy.deepcopy(model)
    for name, layer in [(k, m) for k, m in model.named_modules() if isinstance(m, EmaAttn)]:
        model.set_submodule(name, make(layer))
    return model.eval()


def _authors(layer: EmaAttn) -> AuthorsEmaAttn:
    authors = AuthorsEmaAttn(layer.channels, groups=layer.groups)
    authors.load_state_dict(layer.state_dict())
    return authors


def _exact(models: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Logits in PyTorch, with EMA layers in the reference implementation."""
    with torch.no_grad():
        exact = {name: models[name](images) for name in (PLAIN, SE)}
        with in_reference(models[EMA]):
            exact[EMA] = exact[AUTHORS] = models[EMA](images)
    return exact


def _bench(
    models: dict[str, nn.Module],
    runtime: str,
    images: Tensor,
    fixed: bool,
    exact: dict[str, Tensor],
    rounds: int,
    progress: bool,
) -> list[dict]:
    loaded: dict[str, Loaded] = {}
    errors, failed = {}, {}
    with torch.no_grad():
        for name, model in models.items():
            try:
                found = load_runtime(runtime, model, images, fixed)
                errors[name] = relative_error([found.call(images)], [exact[name]])
            except Exception as error:  # the runtimes share no other class of errors
                failed[name] = first_line(error)
            else:
                loaded[name] = found
        limit = PARITY_TOLERANCE[torch.float32]
        correct = {n: f for n, f in loaded.items() if errors[n] <= limit}
        calls = {name: (lambda call=found.call: call(images)) for name, found in correct.items()}
        label = f"{runtime}, {'fixed' if fixed else 'free'}"
        clock = Clock(images.device, cpu_time=True)
        times = round_robin(calls, rounds, clock, label, progress)
    layers = sum(isinstance(m, EmaAttn) for m in models[EMA].modules())
    rows = []
    for name in models:
        row = {"variant": name, "error": errors.get(name), "parity": name in correct}
        if name in failed:
            row["failed"] = failed[name]
        elif name != PLAIN and PLAIN in loaded:
            row["nodes_per_layer"] = (loaded[name].nodes - loaded[PLAIN].nodes) / layers
        if name in times:
            row["inference_ms"] = times[name]._asdict()
        rows.append(row)
    return rows
