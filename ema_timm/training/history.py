"""What the epochs of a run measured, and which was the best."""

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
            notes: What else is kept of it: ``lr``, and its cost as `ema_timm.training.cost` has it.

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
