"""Records of a run's epochs for other programs: a table, and scalars for TensorBoard.

Both are written anew from the history where a run goes on, so that nothing stands in them twice
and whatever a killed run had left in them does not matter.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from timm.utils import update_summary

from ema_timm.errors import UserError
from ema_timm.files import write_whole
from ema_timm.training.history import History
from ema_timm.training.settings import FinetuneConfig

_SCALARS = {
    "loss/training": "train_loss",
    "loss/validation": "loss",
    "accuracy/top1": "top1",
    "accuracy/top5": "top5",
    "lr": "lr",
}


class Records:
    """What ``--record`` asks for, in the folder of the run's states.

    Args:
        config: The run's settings.
        main: Whether this is the process that writes.

    Raises:
        UserError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, config: FinetuneConfig, main: bool):
        self.folder = Path(config.output) / "training"
        self.table = self.folder / "summary.csv" if main and "csv" in config.record else None
        self.writer = _summary_writer() if main and "tensorboard" in config.record else None
        self.board = None

    @contextlib.contextmanager
    def open(self, history: History) -> Iterator[None]:
        """Within this context epochs can be noted after those of ``history``."""
        if self.table and history.entries:
            self._write_table(history)
        if self.writer:
            place = self.folder / "tensorboard"
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            self.board = self.writer(str(place))
            for entry in history.entries:
                self._add_scalars(entry)
        try:
            yield
        finally:
            if self.board:
                self.board.close()

    def epoch(self, history: History) -> None:
        """Note the last epoch."""
        if self.table:
            self._write_table(history)
        if self.board:
            self._add_scalars(history.entries[-1])
            self.board.flush()

    def _write_table(self, history: History) -> None:
        """Write ``summary.csv`` with the columns of timm's, and epochs counted from 1."""

        def write(path: Path) -> None:
            for number, entry in enumerate(history.entries):
                update_summary(
                    entry["epoch"],
                    {"loss": entry["train_loss"]},
                    {name: entry[name] for name in ("loss", "top1", "top5")},
                    str(path),
                    lr=entry.get("lr", ""),
                    write_header=number == 0,
                )

        write_whole(self.table, write)

    def _add_scalars(self, entry: dict) -> None:
        for tag, name in _SCALARS.items():
            if entry.get(name) is not None:
                self.board.add_scalar(tag, entry[name], entry["epoch"])


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--record tensorboard needs TensorBoard: pip install 'ema-timm[tensorboard]'"
        ) from error
    return SummaryWriter
