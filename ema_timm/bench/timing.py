"""Timing of several variants side by side, and the machine it was done on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ema_timm.environment import versions

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


# MERGED: Memory of one call: what it holds at most, and what it keeps for the backward.
def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that ``call`` had allocated at once beyond what was there before.

    On a CPU from the profiler's record of PyTorch's allocator; memory that a library takes from
    elsewhere is not seen.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def saved_bytes(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that ``call`` keeps for its backward, each storage once.

    Args:
        call: A forward with gradients.
        known: Tensors that are there anyway: the input and the parameters.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in known}  # fake ones have no address
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        """Note what is kept, and keep it as it is."""
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # alive: its number stays its
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(nbytes for nbytes, _ in kept.values())
    del result
    return total


# MERGED: A device's clock, and medians of several calls timed in turn.
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
