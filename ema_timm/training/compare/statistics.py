"""Mean, spread and Student's interval of a few numbers; no more than a table of seeds needs."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

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
