"""Makes a comparison: trains the remaining runs, evaluates them and writes the table."""

import dataclasses
import sys
from collections.abc import Sequence

from ema_timm.compare.intervals import CONFIDENCE
from ema_timm.compare.latency import exported_latencies, latencies
from ema_timm.compare.report import write_report
from ema_timm.compare.rows import make_rows, measured_runs, row_confidence
from ema_timm.compare.runs import PlannedRun, Status, command_line, plan_runs
from ema_timm.compare.schedule import run_all
from ema_timm.compare.settings import CompareConfig, Comparison
from ema_timm.compare.variants import Variant, read_variants
from ema_timm.data.splits import open_both
from ema_timm.environment import pick_device, versions
from ema_timm.errors import UserError, one_line
from ema_timm.files import make_writable
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.options import command_arguments
from ema_timm.training.checkpoint import public_arguments
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model
from ema_timm.training.settings import FinetuneConfig, check_settings


def compare(
    comparison: Comparison,
    devices: Sequence[str | None] = (None,),
    config: CompareConfig | None = None,
    progress: bool = True,
    train: bool = True,
) -> dict:
    """Train the remaining runs of a comparison and write its table.

    Args:
        comparison: From `make_comparison`.
        devices: Devices to run on in parallel; None is the device of the settings.
        config: Other measurements.
        progress: Report finished and remaining runs and the expected end on stderr.
        train: Train; otherwise only make the table of the runs that are finished.

    Returns:
        The content of compare.json.

    Raises:
        UserError: For bad input.
        HubError: If the Hub does not provide the initial weights.
        InterruptedRunError: After Ctrl-C or SIGTERM. The same call continues.
    """
    for name in filter(None, devices):
        pick_device(name)
    variants, runs = _prepare(comparison)
    failed = _evaluate_trained(runs, devices[0], progress)
    if train:
        left = _untrained(runs)
        if progress:
            print(f"{len(left)} of {len(runs)} runs to do", file=sys.stderr)
        if left:
            _check_common(comparison.config)
        failed |= run_all(left, devices, _finish, progress)
    return _write(comparison, variants, runs, failed, config or CompareConfig(), devices[0])


def list_commands(comparison: Comparison) -> list[str]:
    """One independent command for each remaining run. Trains nothing."""
    _, runs = _prepare(comparison)
    return [command_line(run.arguments()) for run in _untrained(runs)]


def _prepare(comparison: Comparison) -> tuple[list[Variant], list[PlannedRun]]:
    """The variants and runs of a comparison, which is then saved in its folder."""
    check_settings(comparison.config)
    variants = read_variants(comparison.attention, comparison.config.model)
    runs = plan_runs(comparison, variants)
    make_writable(comparison.output)
    comparison.save()
    return variants, runs


def _check_common(config: FinetuneConfig) -> None:
    """Open the images and the plain network's initial weights, which every run needs.

    Raises:
        UserError, HubError: If that fails, once instead of in each run.
    """
    train, _ = open_both(config.data_dir, config.split, config.val_split, config.dataset)
    initial = InitialModel(config.model, config.model_kwargs, config.pretrained, config.weights)
    create_model(initial, len(train.class_names))


def _untrained(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    return [run for run in runs if run.status() in (Status.NEW, Status.BEGUN)]


def _evaluate_trained(
    runs: Sequence[PlannedRun], device: str | None, progress: bool
) -> dict[str, str]:
    """Evaluate runs that were trained elsewhere; returns why runs failed, by their names."""
    failed = {}
    for run in runs:
        if run.status() is not Status.TRAINED:
            continue
        try:
            line = _finish(run, device)
        except UserError as error:
            line = failed[run.name] = one_line(error)
        if progress:
            print(f"{run.name}: {line}", file=sys.stderr)
    return failed


def _finish(run: PlannedRun, device: str | None) -> str:
    """Evaluate a trained run on the test images, if there are some; returns its accuracy."""
    if run.test is not None:
        config = run.config
        settings = EvaluateConfig(
            str(run.folder),
            data_dir=config.data_dir,
            split=run.test.name,
            device=device or config.device,
            batch_size=config.batch_size,
            workers=config.workers,
        )
        evaluate(settings, progress=False)
    metrics = (run.results() or {})["metrics"]
    kind = "validation" if run.test is None else "test"
    return f"top-1 {metrics['top1']:.2f}% of {metrics['images']} {kind} images"


def _write(
    comparison: Comparison,
    variants: Sequence[Variant],
    runs: Sequence[PlannedRun],
    failed: dict[str, str],
    config: CompareConfig,
    device: str | None,
) -> dict:
    """Gather the numbers and write the report."""
    measured = measured_runs(runs, failed)
    plain = comparison.config
    arguments = public_arguments(dataclasses.asdict(plain))
    settings = {name: arguments[name] for name in comparison.settings}
    content = {
        "format": 1,
        "model": plain.model,
        "command": _command(dataclasses.replace(comparison, settings=settings), config),
        "images": _images(runs, measured),
        "seeds": comparison.seed_numbers,
        "confidence": CONFIDENCE,
        "interval_confidence": row_confidence(variants),
        "rows": make_rows(measured, variants, plain.model_kwargs),
        "runs": measured,
        "settings": settings,
        "versions": versions(),
    }
    finished = [entry for entry in reversed(measured) if "top1" in entry]
    folders = {entry["variant"]: comparison.output / entry["folder"] for entry in finished}
    if config.latency:
        content["latency"] = latencies(folders, device or plain.device)
    if config.exported_latency:
        content["exported_latency"] = exported_latencies(folders)
    write_report(content, comparison.output)
    return content


def _command(comparison: Comparison, config: CompareConfig) -> str:
    flags = {"latency": config.latency, "exported_latency": config.exported_latency}
    measured = {name: True for name, given in flags.items() if given}
    return command_line([*comparison.arguments(), *command_arguments(measured, CompareConfig)])


def _images(runs: Sequence[PlannedRun], measured: Sequence[dict]) -> dict:
    """Number of training, validation and test images, and which of them gave the accuracies."""
    measured_on = "validation" if not runs or runs[0].test is None else "test"
    for run, entry in zip(runs, measured, strict=True):
        if "top1" in entry:
            results = run.results() or {}
            counts = {part: data["images"] for part, data in results["data"].items()}
            test = {"test": entry["images"]} if measured_on == "test" else {}
            return {**counts, **test, "measured_on": measured_on}
    return {"measured_on": measured_on}
