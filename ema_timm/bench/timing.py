"""Time of several calls side by side, and memory of one call."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

SAMPLE_MS = 20.0
"""A sample repeats a short call until it takes this long, so that the clock does not matter."""


class Timing(NamedTuple):
    """Time of one call in ms over all rounds."""

    median: float
    min: float
    max: float


class Clock:
    """The clock of one device: CUDA events on a GPU, otherwise wall time.

    Args:
        device: Where the calls run.
        cpu_time: Off a GPU, count the CPU time of this process instead of wall time, so that
            other processes matter less.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False):
        self.device = device
        self._now = time.process_time if cpu_time else time.perf_counter

    def wait(self) -> None:
        """Wait until the device has finished; raises if it failed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object], repeats: int) -> float:
        """Time of ``repeats`` calls, one after another, in ms."""
        if self.device.type != "cuda":
            started = self._now()
            for _ in range(repeats):
                call()
            return 1e3 * (self._now() - started)
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(repeats):
                call()
            last.record()
        last.synchronize()
        return first.elapsed_time(last)


def round_robin(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock,
    label: str = "",
    progress: bool = True,
    sample_ms: float = SAMPLE_MS,
) -> dict[str, Timing]:
    """Time each call in turn, ``rounds`` times, so that a drift of the machine affects all alike.

    Args:
        calls: What to time, by name.
        rounds: Samples of each.
        clock: Of the device that the calls run on.
        label: Text of the progress bar.
        progress: Show a bar (on a terminal).
        sample_ms: A sample repeats a call until it takes about this long.

    Returns:
        Time of one call in ms, by name.
    """
    repeats = {}
    for name, call in calls.items():
        clock.time(call, 1)  # allocations, compilation, autotuning
        repeats[name] = max(1, round(sample_ms / max(clock.time(call, 1), 1e-4)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hide = None if progress else True
    with tqdm(total=rounds * len(calls), desc=label, disable=hide, leave=False) as bar:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(clock.time(call, repeats[name]) / repeats[name])
                bar.update()
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


def unfinished(result: dict, done: int, parts: int) -> dict:
    """``result`` with a setting that says how many of its ``parts`` are in it."""
    so_far = {"unfinished": f"{done} of {parts} parts"}
    return result | {"settings": result["settings"] | so_far}


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``call`` had allocated at once, beyond what was allocated before.

    On a CPU, the number comes from the profiler's record of PyTorch's allocator. It does not see
    memory that a library allocates elsewhere.
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
    """Bytes that ``call`` saves for its backward, each storage once.

    Args:
        call: A forward with gradients.
        known: Tensors that exist anyway: the input and the parameters.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in known}  # fake tensors have no address
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        """Count a tensor, and save it as it is."""
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            # Keeping the tensor alive keeps `_cdata` unique.
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(nbytes for nbytes, _ in saved.values())
    del result
    return total
