"""What the epochs of a run measured, and which was the best."""

import sys
from pathlib import Path

import torch

from ema_timm.measure.metrics import Metrics


class History:
    """The epochs so far.

    Args:
        entries: One object an epoch, as results.json has them.
        best: The one whose weights are kept: of the highest top-1 that of the lowest loss on the
            validation images, the first of these.
        extended: Numbers of epochs after which a finished run was extended, as a new run from its
            last weights.
    """

    def __init__(
        self,
        entries: list[dict] | None = None,
        best: dict | None = None,
        extended: list[int] | None = None,
    ):
        self.entries, self.best, self.extended = entries or [], best, extended or []

    @property
    def first(self) -> int:
        """Epochs done before the schedule that now runs began."""
        return self.extended[-1] if self.extended else 0

    def stalled(self, patience: int) -> bool:
        """Whether the last ``patience`` epochs of this schedule have brought none better; 0: no."""
        if not patience or self.best is None:
            return False
        return self.entries[-1]["epoch"] - max(self.best["epoch"], self.first) >= patience

    def add(
        self,
        epoch: int,
        train_loss: float,
        seconds: float,
        metrics: Metrics,
        notes: dict | None = None,
    ) -> bool:
        """Note an epoch.

        Args:
            epoch: Its number, from 1.
            train_loss: Mean loss of its steps, as optimised.
            seconds: Time of its training.
            metrics: Counts on the validation images after it.
            notes: What else is kept of it: ``lr``, and its cost as `Cost` has it.

        Returns:
            Whether it is the best so far.
        """
        entry = {"epoch": epoch, "train_loss": train_loss, "seconds": round(seconds, 2)}
        entry |= (notes or {}) | metrics._asdict()
        self.entries.append(entry)
        best = self.best
        improved = best is None or (metrics.top1, -metrics.loss) > (best["top1"], -best["loss"])
        if improved:
            self.best = entry
        return improved


# MERGED: What an epoch of training costs: time for each image, and memory.
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
