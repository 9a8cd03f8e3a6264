"""The comparison: runs what is left, and makes the table of what is there."""

import sys
from collections.abc import Sequence

from ema_timm.compare.latency import exported_latencies, latencies
from ema_timm.compare.report import write_report
from ema_timm.compare.rows import LEVEL, make_rows, measured_runs
from ema_timm.compare.runs import PlannedRun, Stand, command_line, plan_runs
from ema_timm.compare.schedule import run_all
from ema_timm.compare.settings import CompareConfig, Plan
from ema_timm.compare.variants import Variant, read_variants
from ema_timm.environment import pick_device, versions
from ema_timm.errors import UserError, first_line
from ema_timm.files import make_writable
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.options import spelled
from ema_timm.training.checkpoint import public_arguments
from ema_timm.training.settings import FinetuneConfig, check_settings


def compare(
    plan: Plan,
    devices: Sequence[str | None] = (None,),
    config: CompareConfig | None = None,
    progress: bool = True,
) -> dict:
    """Run what is left of a comparison and write its table.

    Args:
        plan: What is compared, as `make_plan` gives it.
        devices: Where runs go side by side; None is the device of the settings.
        config: What else is measured.
        progress: Tell on stderr what is done, what is left and when it will end.

    Returns:
        The content of compare.json.

    Raises:
        UserError: For bad input.
        InterruptedRunError: After Ctrl-C or SIGTERM; the same call goes on.
    """
    for name in filter(None, devices):
        pick_device(name)
    variants, runs = _prepare(plan)
    device = devices[0]
    failed = _measure_trained(runs, device, progress)
    left = [run for run in runs if run.stand() in (Stand.NEW, Stand.BEGUN)]
    if progress:
        print(f"{len(left)} of {len(runs)} runs to do", file=sys.stderr)
    failed |= run_all(left, devices, _finish, progress)
    return _write(plan, variants, runs, failed, config or CompareConfig(), device)


def collect(
    plan: Plan,
    device: str | None = None,
    config: CompareConfig | None = None,
    progress: bool = True,
) -> dict:
    """Make the table of whatever is there; trains nothing.

    Args:
        plan: As in `compare`.
        device: Where test images are measured that were not yet.
        config: What else is measured.
        progress: Tell on stderr what is measured.

    Returns:
        The content of compare.json.

    Raises:
        UserError: For bad input.
    """
    variants, runs = _prepare(plan)
    failed = _measure_trained(runs, device, progress)
    return _write(plan, variants, runs, failed, config or CompareConfig(), device)


def list_commands(plan: Plan) -> list[str]:
    """One command a run that is not done, each of which stands for itself; trains nothing."""
    _, runs = _prepare(plan)
    left = [run for run in runs if run.stand() in (Stand.NEW, Stand.BEGUN)]
    return [command_line(run.arguments()) for run in left]


def _prepare(plan: Plan) -> tuple[list[Variant], list[PlannedRun]]:
    """The variants and runs of a plan, which is in its folder from now on."""
    check_settings(FinetuneConfig(**plan.settings))
    variants = read_variants(plan.attention, plan.settings["model"])
    runs = plan_runs(plan, variants)
    make_writable(plan.output)
    plan.save()
    return variants, runs


def _measure_trained(
    runs: Sequence[PlannedRun], device: str | None, progress: bool
) -> dict[str, str]:
    """Measure what came back from elsewhere; why that failed, by the runs' names."""
    failed = {}
    for run in runs:
        if run.stand() is not Stand.TRAINED:
            continue
        try:
            line = _finish(run, device)
        except UserError as error:
            line = failed[run.name] = first_line(error)
        if progress:
            print(f"{run.name}: {line}", file=sys.stderr)
    return failed


def _finish(run: PlannedRun, device: str | None) -> str:
    """Measure a run that was trained; what is told of it."""
    if run.test is not None:
        _measure(run, device)
    metrics = (run.results() or {})["metrics"]
    kind = "validation" if run.test is None else "test"
    return f"top-1 {metrics['top1']:.2f}% of {metrics['images']} {kind} images"


def _measure(run: PlannedRun, device: str | None) -> None:
    """Measure the best weights of a run on the test images."""
    config = FinetuneConfig(**run.settings)
    settings = EvaluateConfig(
        str(run.folder),
        data_dir=config.data_dir,
        split=run.test.name,
        device=device or config.device,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    evaluate(settings, progress=False)


def _write(
    plan: Plan,
    variants: Sequence[Variant],
    runs: Sequence[PlannedRun],
    failed: dict[str, str],
    config: CompareConfig,
    device: str | None,
) -> dict:
    """Gather the numbers and write them."""
    measured = measured_runs(runs, failed)
    public = public_arguments(FinetuneConfig(**plan.settings))
    settings = {name: public[name] for name in plan.settings}
    rows = make_rows(measured, variants, plan.settings.get("model_kwargs", {}))
    content = {
        "format": 1,
        "model": plan.settings["model"],
        "command": _command(plan, settings),
        "images": _images(runs, measured),
        "seeds": plan.seed_numbers,
        "confidence": LEVEL,
        "rows": rows,
        "runs": measured,
        "settings": settings,
        "versions": versions(),
    }
    folders = {m["variant"]: plan.output / m["folder"] for m in reversed(measured) if "top1" in m}
    if config.latency:
        content["latency"] = latencies(folders, device or plan.settings.get("device", "auto"))
    if config.exported_latency:
        content["exported_latency"] = exported_latencies(folders)
    write_report(content, plan.output)
    return content


def _command(plan: Plan, settings: dict) -> str:
    """The command of a comparison of these settings."""
    more = ["--attention", *plan.attention, "--seeds", str(plan.seeds)]
    return command_line(["compare", *spelled(settings, FinetuneConfig), *more])


def _images(runs: Sequence[PlannedRun], measured: Sequence[dict]) -> dict:
    """How many images the runs trained on, chose their epoch on and were measured on."""
    for run, entry in zip(runs, measured, strict=True):
        if "top1" in entry:
            results = run.results() or {}
            counts = {part: data["images"] for part, data in results["data"].items()}
            test = {} if run.test is None else {"test": entry["images"]}
            return {**counts, **test, "measured_on": "validation" if run.test is None else "test"}
    return {"measured_on": "validation" if not runs or runs[0].test is None else "test"}
