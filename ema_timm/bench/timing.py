"""Timing of several variants side by side, and the machine it was done on."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ema_timm.measure.versions import versions

MIN_SAMPLE_SECONDS = 0.02
"""A sample repeats a short call until it takes this long, so that the clock does not matter."""


class Timing(NamedTuple):
    """Time of one call in ms over all rounds."""

    median: float
    min: float
    max: float


def round_robin(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    label: str = "",
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each call in turn, ``rounds`` times, so that a drifting machine is shared by all.

    Args:
        calls: What to time, by name.
        rounds: Samples of each.
        device: Where the calls run; waited for before the clock is read.
        label: Text of the progress bar.
        progress: Show a bar (on a terminal).
        clock: Seconds; ``time.process_time`` counts those of this process alone.

    Returns:
        Time of one call in ms, by name.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # allocations, compilation, autotuning
        seconds = _sample(call, 1, device, clock)
        repeats[name] = max(1, round(MIN_SAMPLE_SECONDS / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hide = None if progress else True
    with tqdm(total=rounds * len(calls), desc=label, disable=hide, leave=False) as bar:
        for _ in range(rounds):
            for name, call in calls.items():
                seconds = _sample(call, repeats[name], device, clock)
                samples[name].append(1e3 * seconds / repeats[name])
                bar.update()
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


def _sample(
    call: Callable[[], object], repeats: int, device: torch.device, clock: Callable[[], float]
) -> float:
    _wait(device)
    started = clock()
    for _ in range(repeats):
        call()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unfinished(result: dict, done: int, parts: int) -> dict:
    """``result`` as it is to be kept after ``done`` of its ``parts``, and says so."""
    so_far = {"unfinished": f"{done} of {parts} parts"}
    return result | {"settings": result["settings"] | so_far}


def machine(device: torch.device) -> dict:
    """Name, cores, threads and versions, for whoever reads the numbers."""
    name = _cpu_name()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return {
        "name": name,
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
