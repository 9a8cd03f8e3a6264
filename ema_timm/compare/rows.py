"""The rows of the table, from the results of the runs, with confidence intervals.

Every number comes from a results.json, or is the mean of such numbers.
"""

import math
import statistics
from collections.abc import Sequence

from ema_timm.compare.runs import PlannedRun, Status
from ema_timm.compare.schedule import failure_reason
from ema_timm.compare.variants import NONE, Variant, describe_start

CONFIDENCE = 0.95
NO_DIFFERENCE, BETTER, WORSE = "no difference shown", "better", "worse"


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
        first = first or (run.folder.name, _images(results))
        other = _other_images(results, *first)
        objects.append(entry | ({"why_not": other} if other else _numbers(results)))
    return objects


def _why_not(run: PlannedRun, status: Status) -> str:
    if status is Status.TRAINED or not run.log.is_file():
        return status.value
    return failure_reason(run.log)


def _other_images(results: dict, name: str, images: dict) -> str:
    """Why a run cannot be compared with the run ``name`` on ``images``; empty if it can."""
    for part, data in _images(results).items():
        if data != images.get(part):
            return f"its {part} images differ from those of {name}"
    return ""


def _images(results: dict) -> dict:
    data = dict(results["data"])
    if "evaluation" in results:
        data["test"] = results["evaluation"]["data"]["fingerprint"]
    return data


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
        and ``why_not`` of the others. If some are finished also ``top1`` and ``top5`` (``mean``
        and ``std`` over the seeds, in %), ``difference`` to the plain network, paired by seed
        (``mean``, ``low`` and ``high`` of its 95% interval in percentage points, ``pairs``,
        ``verdict``), ``parameters``, ``macs``, ``images_per_second`` (mean), ``peak_memory_mib``
        (highest) and ``start``.
    """
    by_variant = {v.name: [m for m in measured if m["variant"] == v.name] for v in variants}
    plain = {m["seed"]: m["top1"] for m in by_variant.get(NONE, []) if "why_not" not in m}
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
            row["difference"] = None if variant.name == NONE else _difference(done, plain)
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
        "top1": _over_seeds([m["top1"] for m in done]),
        "top5": _over_seeds([m["top5"] for m in done]) if done[0]["top5"] is not None else None,
        "parameters": done[0]["parameters"],
        "macs": done[0]["macs"],
        "macs_by_definition": done[0]["macs_by_definition"],
        "images_per_second": statistics.fmean(speeds) if speeds else None,
        "peak_memory_mib": max(peaks, default=None),
    }


def _over_seeds(values: list[float]) -> dict:
    return {"mean": statistics.fmean(values), "std": standard_deviation(values)}


def _difference(done: Sequence[dict], plain: dict[int, float]) -> dict | None:
    """The difference to the plain network in percentage points, paired by seed."""
    differences = [m["top1"] - plain[m["seed"]] for m in done if m["seed"] in plain]
    if not differences:
        return None
    low, high = confidence_interval(differences)
    if low is None:
        verdict = "one seed gives no interval"
    else:
        verdict = BETTER if low > 0 else WORSE if high < 0 else NO_DIFFERENCE
    row = {"mean": statistics.fmean(differences), "pairs": len(differences)}
    return row | {"low": low, "high": high, "verdict": verdict}


def standard_deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def confidence_interval(
    values: Sequence[float], level: float = CONFIDENCE
) -> tuple[float, float] | tuple[None, None]:
    """Student's confidence interval of the mean of independent, normally distributed values.

    Args:
        values: The values.
        level: Fraction of such intervals that contain the true mean.

    Returns:
        Its bounds; None and None for fewer than two values.
    """
    deviation = standard_deviation(values)
    if deviation is None:
        return None, None
    mean, count = statistics.fmean(values), len(values)
    half = t_quantile(0.5 + level / 2, count - 1) * deviation / math.sqrt(count)
    return mean - half, mean + half


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection.

    Args:
        probability: From 0.5 up to below 1.
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _t_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_within(t: float, degrees: int) -> float:
    """Probability of a Student-t variable in [-t, t]: a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return (angle + (sine * total if degrees > 1 else 0.0)) * 2 / math.pi
