"""Confidence intervals of the differences between variants, and the verdicts that follow.

The accuracies of N images are multiples of 100 / N. If all seeds differ by the same number of
images, the standard deviation is 0 by chance, and Student's interval would have no width. So the
standard deviation is at least one image. A test simulates identical networks and counts how often
they are called different.
"""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
"""Probability that all intervals of a table contain their true differences."""
LEAST_SEEDS = 3
"""Fewer give no interval: two seeds called identical networks different in up to 12% of tables."""
NO_DIFFERENCE, BETTER, WORSE = "no difference shown", "better", "worse"


def interval_confidence(differences: int) -> float:
    """Confidence of each interval if a table has this many (Bonferroni's correction)."""
    return 1 - (1 - CONFIDENCE) / max(differences, 1)


def describe_difference(values: Sequence[float], images: int, level: float) -> dict:
    """Mean, interval and verdict of paired differences of accuracies.

    Args:
        values: One difference for each seed, in percentage points.
        images: Number of images that the accuracies were measured on.
        level: Confidence of the interval.

    Returns:
        ``mean``; ``low``, ``high`` and ``half_width`` of the interval of the mean, None for fewer
        than `LEAST_SEEDS` values; ``pairs``, the number of values; ``verdict``.
    """
    mean, count = statistics.fmean(values), len(values)
    found = {"mean": mean, "low": None, "high": None, "half_width": None, "pairs": count}
    if count < LEAST_SEEDS:
        return found | {"verdict": f"needs {LEAST_SEEDS} seeds"}
    half = interval_half_width(values, level, 100 / images)
    low, high = mean - half, mean + half
    verdict = BETTER if low > 0 else WORSE if high < 0 else NO_DIFFERENCE
    return found | {"low": low, "high": high, "half_width": half, "verdict": verdict}


def interval_half_width(values: Sequence[float], level: float, least_std: float = 0.0) -> float:
    """Half the width of Student's confidence interval of a mean.

    Args:
        values: Independent, normally distributed values, at least two.
        level: Fraction of such intervals that contain the true mean.
        least_std: Lower bound for the standard deviation.
    """
    deviation = max(statistics.stdev(values), least_std)
    return t_quantile(0.5 + level / 2, len(values) - 1) * deviation / math.sqrt(len(values))


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
