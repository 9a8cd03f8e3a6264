"""Run folders -> the rows of the table.

Every number is one of a results.json, or the mean of such numbers.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ema_timm.compare.runs import PlannedRun, Stand
from ema_timm.compare.schedule import reason
from ema_timm.compare.variants import NONE, Variant, start_of

NO_DIFFERENCE, BETTER, WORSE = "no difference shown", "better", "worse"


def measured_runs(runs: Sequence[PlannedRun], failed: dict[str, str]) -> list[dict]:
    """What each run has measured, or why it has not.

    Args:
        runs: All runs of the comparison.
        failed: Why runs failed just now, by their names.

    Returns:
        An object a run: ``variant``, ``seed``, ``folder``, and either ``why_not`` or its numbers.
    """
    objects, first = [], None
    for run in runs:
        entry = {"variant": run.variant.name, "seed": run.seed, "folder": run.folder.name}
        stand = run.stand()
        results = run.results()
        if stand is not Stand.DONE or results is None:
            objects.append(entry | {"why_not": failed.get(run.name) or _why_not(run, stand)})
            continue
        first = first or (run.folder.name, _images(results))
        other = _other_images(results, *first)
        objects.append(entry | ({"why_not": other} if other else _numbers(results)))
    return objects


def _why_not(run: PlannedRun, stand: Stand) -> str:
    if stand is Stand.TRAINED or not run.log.is_file():
        return stand.value
    return reason(run.log)


def _other_images(results: dict, name: str, images: dict) -> str:
    """Why a run cannot be compared with the one called ``name``, of these images; else empty."""
    for part, data in _images(results).items():
        if data != images.get(part):
            return f"its {part} images are not those of {name}"
    return ""


def _images(results: dict) -> dict:
    data = dict(results["data"])
    if "evaluation" in results:
        data["test"] = results["evaluation"]["data"]["fingerprint"]
    return data


def _numbers(results: dict) -> dict:
    history = results["history"]
    speeds = [e["images_per_second"] for e in history if e.get("images_per_second")]
    peaks = [e["peak_memory_mib"] for e in history if e.get("peak_memory_mib")]
    return {
        **results["metrics"],
        "best_epoch": results["best_epoch"],
        "parameters": results["parameters"],
        "macs": results["macs"]["total"],
        "macs_by_definition": results["macs"]["total"]
        - results["macs"]["ema"]
        + results["macs"]["ema_definition"],
        "images_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_mib": max(peaks, default=None),
        "weights_sha256": results["weights_sha256"],
        "weights": results["base"]["weights"],
    }


def make_rows(
    measured: Sequence[dict], variants: Sequence[Variant], model_kwargs: dict
) -> list[dict]:
    """One row a variant.

    Args:
        measured: As `measured_runs` gives them.
        variants: The variants, in the order of the table.
        model_kwargs: What every network was made with.

    Returns:
        ``variant``, ``model``, ``model_kwargs``, ``seeds`` that are done, ``why_not`` of the
        others; and where some are done ``top1`` and ``top5`` (``mean``, ``std`` over the seeds, in
        %), ``difference`` (to the plain network, paired by seed: ``mean``, ``low`` and ``high`` of
        its 95% interval in percentage points, ``pairs``, ``verdict``), ``parameters``, ``macs``,
        ``images_per_second`` (mean), ``peak_memory_mib`` (highest), ``start``.
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
            "why_not": _why(by_variant[variant.name]),
        }
        if done:
            row |= _summary(done)
            row["start"] = start_of(variant, kwargs, done[0]["weights"])
            row["difference"] = None if variant.name == NONE else _difference(done, plain)
        rows.append(row)
    return rows


def _why(entries: Sequence[dict]) -> list[str]:
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
    return {"mean": statistics.fmean(values), "std": spread(values)}


def _difference(done: Sequence[dict], plain: dict[int, float]) -> dict | None:
    """The difference to the plain network in percentage points, paired by seed."""
    differences = [m["top1"] - plain[m["seed"]] for m in done if m["seed"] in plain]
    if not differences:
        return None
    found = {"mean": statistics.fmean(differences), "pairs": len(differences)}
    bounds = interval(differences)
    if bounds is None:
        return found | {"low": None, "high": None, "verdict": "one seed tells nothing of chance"}
    verdict = NO_DIFFERENCE if bounds.holds_zero else BETTER if bounds.mean > 0 else WORSE
    return found | {"low": bounds.low, "high": bounds.high, "verdict": verdict}


# MERGED: Mean, spread and Student's interval of a few numbers; no more than a table of seeds needs.
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval, in the unit of the numbers."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether zero is among the values that are not excluded."""
        return self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's confidence interval of the mean of independent values, normally distributed.

    Args:
        values: The values.
        level: Part of such intervals that hold the true mean.

    Returns:
        None of fewer than two values, which tell nothing of their spread.
    """
    deviation = spread(values)
    if deviation is None:
        return None
    mean, count = statistics.fmean(values), len(values)
    half = t_quantile(0.5 + level / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that a Student-t variable is below with a probability, by bisection.

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
    """Probability that a Student-t variable lies in [-t, t]: a finite sum for whole degrees.

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
