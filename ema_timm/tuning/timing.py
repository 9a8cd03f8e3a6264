"""A device's clock, and medians of several calls timed in turn."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 11
"""Samples of each call."""
SAMPLE_MS = 5.0
"""A sample repeats a short call until it takes about this long."""
WARM_UP = 2
"""Calls before the first sample: allocations, and clocks that rise under load."""


class Clock:
    """The time of one device: CUDA's events, elsewhere the processor's counter.

    Args:
        device: A GPU or the CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        """Wait until the device has done all that it was given; raises where it failed at it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object], repeats: int) -> float:
        """Time of ``repeats`` calls, one after another, in ms."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            return 1e3 * (time.perf_counter() - started)
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(repeats):
                call()
            last.record()
        last.synchronize()
        return first.elapsed_time(last)


def medians(calls: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, float]:
    """Median time of one call in ms, by name; in turn, so that all share a machine that drifts."""
    repeats = {}
    for name, call in calls.items():
        clock.time(call, WARM_UP)
        repeats[name] = max(1, round(SAMPLE_MS / max(clock.time(call, 1), 1e-4)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(clock.time(call, repeats[name]) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}
