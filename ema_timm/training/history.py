"""What the epochs of a run measured, and which was the best."""

from ema_timm.measure.metrics import Metrics


class History:
    """The epochs so far.

    Args:
        entries: One object an epoch, as results.json has them.
        best: The one whose weights are kept: the first of the highest top-1.
    """

    def __init__(self, entries: list[dict] | None = None, best: dict | None = None):
        self.entries, self.best = entries or [], best

    def add(self, epoch: int, train_loss: float, seconds: float, metrics: Metrics) -> bool:
        """Note an epoch.

        Args:
            epoch: Its number, from 1.
            train_loss: Mean loss of its steps, as optimised.
            seconds: Time of its training.
            metrics: Counts on the validation images after it.

        Returns:
            Whether it is the best so far.
        """
        entry = {"epoch": epoch, "train_loss": train_loss, "seconds": round(seconds, 2)}
        entry |= metrics._asdict()
        self.entries.append(entry)
        improved = self.best is None or metrics.top1 > self.best["top1"]
        if improved:
            self.best = entry
        return improved
