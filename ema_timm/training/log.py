"""What a run tells on stderr while it goes on."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.utils import update_summary
from tqdm.auto import tqdm

from ema_timm.errors import require_packages
from ema_timm.files import write_whole
from ema_timm.training.checkpoint import PLOTS
from ema_timm.training.data import Images
from ema_timm.training.epoch import Position
from ema_timm.training.history import History
from ema_timm.training.network import Network
from ema_timm.training.settings import FinetuneConfig


class Log:
    """A line when the run starts, and one an epoch.

    Args:
        config: The run's settings.
        resumed: Whether the run continues.
        shown: Tell at all.
    """

    def __init__(self, config: FinetuneConfig, resumed: bool, shown: bool):
        self.config, self.resumed, self.shown = config, resumed, shown

    def start(
        self,
        network: Network,
        images: Images,
        device: torch.device,
        position: Position,
        history: History,
    ) -> None:
        """Tell what is trained, on what, and from where on."""
        if position == Position(history.first) and history.first:
            self._tell(
                f"the run of {history.first} epochs was finished: epochs {history.first + 1} to "
                f"{self.config.epochs} are a new run from its last weights, with a schedule of "
                "their own"
            )
        done = ""
        if self.resumed:
            done = f", from epoch {position.epoch + 1}, step {position.step + 1}"
        size = "×".join(map(str, network.preprocessing["input_size"][1:]))
        self._tell(
            f"{self.config.model} ({network.base['weights']}), {len(network.classes)} classes, "
            f"{len(images.train)} training and {len(images.val)} validation images at "
            f"{size}, on {device}{done}"
        )
        if not PLOTS:
            self._tell("no curves.png: matplotlib is missing (pip install 'ema-timm[train]')")

    def epoch(self, history: History) -> None:
        """Tell of the last epoch."""
        last = history.entries[-1]
        self._tell(
            f"epoch {last['epoch']}/{self.config.epochs}  train loss {last['train_loss']:.4f}  "
            f"top-1 {last['top1']:.2f}% of {last['images']} images  "
            f"(best {history.best['top1']:.2f}%)  {last['seconds']:.1f} s"
        )

    def stopped_early(self, history: History) -> None:
        """Tell that the run ended before its last epoch, and why."""
        self._tell(
            f"no epoch was better than {history.best['epoch']} in the last {self.config.patience}: "
            f"the run ends after {history.entries[-1]['epoch']} of {self.config.epochs}. --resume "
            "with more --patience goes on"
        )

    def _tell(self, line: str) -> None:
        if self.shown:
            tqdm.write(line, file=sys.stderr)


# MERGED: Records of a run's epochs for other programs: a table, and scalars for TensorBoard.
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
    require_packages(["tensorboard"], "tensorboard", "--record tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
