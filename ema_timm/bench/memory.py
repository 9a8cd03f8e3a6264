"""Memory of one call: what it holds at most, and what it keeps for the backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


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
