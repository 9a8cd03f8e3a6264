"""The rows of the table, from the results of the runs.

Every number comes from a results.json, or is the mean of such numbers.
"""

import statistics
from collections.abc import Sequence

from ema_timm.compare.intervals import describe_difference, interval_confidence
from ema_timm.compare.runs import PlannedRun, Status
from ema_timm.compare.schedule import failure_reason
from ema_timm.compare.variants import NONE, Variant, describe_start


def measured_runs(runs: Sequence[PlannedRun], failed: dict[str, str]) -> list[dict]:
    """The numbers of each run, or why it has none.

    Args:
        runs: All runs of the comparison.
        failed: Why runs failed just now, by their names.

    Returns:
        An object for each run: ``variant``, ``seed``, ``folder``, and either ``why_not`` or its
        numbers.
    """
    objects, first = [], None
    for run in runs:
        entry = {"variant": run.variant.name, "seed": run.seed, "folder": run.folder.name}
        status, results = run.status(), run.results()
        if status is not Status.DONE or results is None:
            objects.append(entry | {"why_not": failed.get(run.name) or _why_not(run, status)})
            continue
        first = first or (run.folder.name, _conditions(results))
        other = _other_conditions(results, *first)
        objects.append(entry | ({"why_not": other} if other else _numbers(results)))
    return objects


def _why_not(run: PlannedRun, status: Status) -> str:
    if status is Status.TRAINED or not run.log.is_file():
        return status.value
    return failure_reason(run.log)


def _other_conditions(results: dict, name: str, conditions: dict) -> str:
    """Why a run cannot be compared with the run ``name``; empty if it can."""
    for what, value in _conditions(results).items():
        if value != conditions.get(what, value):
            return f"its {what} differ from those of {name}"
    return ""


def _conditions(results: dict) -> dict:
    """What all runs of a table must have in common, besides the settings in their arguments."""
    images = {f"{part} images": data for part, data in results["data"].items()}
    if "evaluation" in results:
        images["test images"] = results["evaluation"]["data"]["fingerprint"]
    file = {"initial weights": results["base"]["sha256"]} if results["base"].get("sha256") else {}
    return {
        **images,
        **file,
        "class weights": results.get("class_weights"),
        "numbers of processes": results["processes"],
        "extensions after the last epoch": results.get("extended_after"),
    }


def _numbers(results: dict) -> dict:
    history, macs = results["history"], results["macs"]
    speeds = [e["images_per_second"] for e in history if e.get("images_per_second")]
    peaks = [e["peak_memory_mib"] for e in history if e.get("peak_memory_mib")]
    return {
        **results["metrics"],
        "best_epoch": results["best_epoch"],
        "parameters": results["parameters"],
        "macs": macs["total"],
        "macs_by_definition": macs["total"] - macs["ema"] + macs["ema_definition"],
        "images_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_mib": max(peaks, default=None),
        "weights_sha256": results["weights_sha256"],
        "weights": results["base"]["weights"],
    }


def row_confidence(variants: Sequence[Variant]) -> float:
    """Confidence of the interval of each variant's difference to the plain network."""
    return interval_confidence(sum(variant.name != NONE for variant in variants))


def make_rows(
    measured: Sequence[dict], variants: Sequence[Variant], model_kwargs: dict
) -> list[dict]:
    """One row for each variant.

    Args:
        measured: From `measured_runs`.
        variants: The variants, in the order of the table.
        model_kwargs: Arguments of every network.

    Returns:
        For each variant ``variant``, ``model``, ``model_kwargs``, ``seeds`` of its finished runs,
        and ``why_not`` of the others. If some are finished also ``top1``, ``top5`` and
        ``balanced_accuracy`` (``mean`` and ``std`` over these seeds, in %), ``difference`` of
        ``top1`` to the plain network, paired by seed, as `describe_difference` gives it,
        ``parameters``, ``macs``, ``images_per_second`` (mean), ``peak_memory_mib`` (highest) and
        ``start``.
    """
    by_variant = {v.name: [m for m in measured if m["variant"] == v.name] for v in variants}
    plain = {m["seed"]: m["top1"] for m in by_variant.get(NONE, []) if "why_not" not in m}
    level = row_confidence(variants)
    rows = []
    for variant in variants:
        done = [m for m in by_variant[variant.name] if "why_not" not in m]
        kwargs = {**model_kwargs, **variant.model_kwargs}
        row = {
            "variant": variant.name,
            "model": variant.model,
            "model_kwargs": kwargs,
            "seeds": [m["seed"] for m in done],
            "why_not": _reasons(by_variant[variant.name]),
        }
        if done:
            row |= _summary(done)
            row["start"] = describe_start(variant, kwargs, done[0]["weights"])
            row["difference"] = None if variant.name == NONE else _difference(done, plain, level)
        rows.append(row)
    return rows


def _reasons(entries: Sequence[dict]) -> list[str]:
    """Why runs are missing: each reason once, with its seeds."""
    seeds: dict[str, list[int]] = {}
    for entry in entries:
        if "why_not" in entry:
            seeds.setdefault(entry["why_not"], []).append(entry["seed"])
    return [f"seed {', '.join(map(str, which))}: {why}" for why, which in seeds.items()]


def _summary(done: Sequence[dict]) -> dict:
    speeds = [m["images_per_second"] for m in done if m["images_per_second"]]
    peaks = [m["peak_memory_mib"] for m in done if m["peak_memory_mib"]]
    return {
        **{name: _over_seeds(name, done) for name in ("top1", "top5", "balanced_accuracy")},
        "parameters": done[0]["parameters"],
        "macs": done[0]["macs"],
        "macs_by_definition": done[0]["macs_by_definition"],
        "images_per_second": statistics.fmean(speeds) if speeds else None,
        "peak_memory_mib": max(peaks, default=None),
    }


def _over_seeds(metric: str, done: Sequence[dict]) -> dict | None:
    """Mean and standard deviation (n - 1 in its denominator); None if a run lacks the metric."""
    values = [m.get(metric) for m in done]
    if None in values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std}


def _difference(done: Sequence[dict], plain: dict[int, float], level: float) -> dict | None:
    """The difference to the plain network, paired by seed."""
    pairs = [m for m in done if m["seed"] in plain]
    if not pairs:
        return None
    values = [m["top1"] - plain[m["seed"]] for m in pairs]
    return describe_difference(values, pairs[0]["images"], level)
