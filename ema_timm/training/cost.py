"""What an epoch of training costs: time for each image, and memory."""

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MIB = 1 << 20


def epoch_cost(images: int, seconds: float, device: torch.device) -> dict[str, float | None]:
    """What an epoch has cost, for its entry in the history.

    Args:
        images: Trained on, over all processes.
        seconds: That it took, with loading and augmenting them.
        device: Where this process computes.

    Returns:
        ``images_per_second`` and ``peak_memory_mib``, as `ema_timm.checkpoints.results` lists them.
    """
    peak = peak_memory(device)
    return {
        "images_per_second": round(images / seconds, 2),
        "peak_memory_mib": None if peak is None else round(peak / _MIB, 1),
    }


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held at once so far: of a GPU by PyTorch, else of memory by this process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # Linux starts the count of getrusage with what the parent held.
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
    try:
        import resource
    except ImportError:  # not Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
