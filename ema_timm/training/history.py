"""What each epoch of a run measured and cost, and which epoch was the best."""

import sys
from pathlib import Path

import torch

from ema_timm.measure.metrics import Metrics

_STATUS = Path("/proc/self/status")
_MIB = 1 << 20


class History:
    """The epochs so far.

    Args:
        entries: One object for each epoch, as in results.json.
        best: The entry whose weights are kept: highest top-1 accuracy, then lowest loss on the
            validation images, then first.
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
    def first_epoch(self) -> int:
        """Epochs done before the current schedule began."""
        return self.extended[-1] if self.extended else 0

    def stalled(self, patience: int) -> bool:
        """Whether the last ``patience`` epochs of this schedule brought no improvement.

        With patience 0 a run never stalls.
        """
        if not patience or self.best is None:
            return False
        return self.entries[-1]["epoch"] - max(self.best["epoch"], self.first_epoch) >= patience

    def add(
        self,
        epoch: int,
        train_loss: float,
        seconds: float,
        metrics: Metrics,
        more: dict | None = None,
    ) -> bool:
        """Add an epoch.

        Args:
            epoch: Its number, from 1.
            train_loss: Mean loss of its batches, as optimised.
            seconds: Its training time.
            metrics: Metrics on the validation images after it.
            more: Other values of the entry: ``lr``, and those of `epoch_cost`.

        Returns:
            Whether it is the best so far.
        """
        entry = {"epoch": epoch, "train_loss": train_loss, "seconds": round(seconds, 2)}
        entry |= (more or {}) | metrics._asdict()
        self.entries.append(entry)
        best = self.best
        improved = best is None or (metrics.top1, -metrics.loss) > (best["top1"], -best["loss"])
        if improved:
            self.best = entry
        return improved


def epoch_cost(images: int, seconds: float, device: torch.device) -> dict[str, float | None]:
    """The cost of an epoch, for its entry in the history.

    Args:
        images: Training images, over all processes.
        seconds: Training time, with loading and augmentation.
        device: The device of this process.

    Returns:
        ``images_per_second`` and ``peak_memory_mib``, described in `ema_timm.checkpoints.results`.
    """
    peak = peak_memory(device)
    return {
        "images_per_second": round(images / seconds, 2),
        "peak_memory_mib": None if peak is None else round(peak / _MIB, 1),
    }


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far in bytes: PyTorch's on a GPU, otherwise that of this process.

    None if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # On Linux, getrusage would start with the peak of the parent process.
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
    try:
        import resource
    except ImportError:  # not Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
