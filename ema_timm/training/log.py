"""What a run reports: lines on stderr, and files for other programs."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.utils import update_summary
from tqdm.auto import tqdm

from ema_timm.errors import require_packages
from ema_timm.files import write_whole
from ema_timm.training.checkpoint import DRAWS_CURVES
from ema_timm.training.data import Images
from ema_timm.training.epoch import Position
from ema_timm.training.history import History
from ema_timm.training.network import RunNetwork

_SCALARS = {
    "loss/training": "train_loss",
    "loss/validation": "loss",
    "accuracy/top1": "top1",
    "accuracy/top5": "top5",
    "lr": "lr",
}


class Log:
    """Prints lines when the run starts, after each epoch, and if it ends early.

    Args:
        epochs: Number of epochs.
        shown: Print at all.
    """

    def __init__(self, epochs: int, shown: bool):
        self.epochs, self.shown = epochs, shown

    def start(
        self,
        model: str,
        network: RunNetwork,
        images: Images,
        device: torch.device,
        history: History,
        resumed_at: Position | None,
    ) -> None:
        """Report what is trained and, if the run resumes, from where."""
        first, done = history.first_epoch, ""
        if resumed_at is not None:
            done = f", from epoch {resumed_at.epoch + 1}, step {resumed_at.step + 1}"
            if first and resumed_at == Position(first):
                self._print(
                    f"the run of {first} epochs was finished: epochs {first + 1} to {self.epochs} "
                    "are a new run from its last weights, with a new schedule"
                )
        size = "×".join(map(str, network.preprocessing["input_size"][1:]))
        self._print(
            f"{model} ({network.base['weights']}), {len(network.classes)} classes, "
            f"{len(images.train)} training and {len(images.val)} validation images at "
            f"{size}, on {device}{done}"
        )
        if not DRAWS_CURVES:
            self._print("no curves.png: matplotlib is missing (pip install 'ema-timm[train]')")

    def processes_changed(self, before: int, now: int, images: int) -> None:
        """Report that the run continues on another number of processes.

        Args:
            before: Number of processes before.
            now: Number of processes now.
            images: Images of one process in one step.
        """
        self._print(
            f"{now} process(es) instead of {before}: a step has {images * now} images instead of "
            f"{images * before}, at the same --lr. So the weights will differ from those of an "
            "uninterrupted run"
        )

    def epoch(self, history: History) -> None:
        """Report the last epoch."""
        last = history.entries[-1]
        self._print(
            f"epoch {last['epoch']}/{self.epochs}  train loss {last['train_loss']:.4f}  "
            f"top-1 {last['top1']:.2f}% of {last['images']} images  "
            f"(best {history.best['top1']:.2f}%)  {last['seconds']:.1f} s"
        )

    def stopped_early(self, history: History, patience: int) -> None:
        """Report that the run ended before its last epoch, and why."""
        self._print(
            f"no epoch was better than {history.best['epoch']} in the last {patience}: the run "
            f"ends after {history.entries[-1]['epoch']} of {self.epochs}. To continue, use "
            "--resume with more --patience"
        )

    def _print(self, line: str) -> None:
        if self.shown:
            tqdm.write(line, file=sys.stderr)


class Records:
    """Writes each epoch as a table or as scalars for TensorBoard, as ``--record`` requests.

    Args:
        folder: The folder of the run's states.
        formats: "csv", "tensorboard" or both.

    Raises:
        UserError: If TensorBoard is requested and not installed.
    """

    def __init__(self, folder: Path, formats: Sequence[str]):
        self.folder = folder
        self.table = folder / "summary.csv" if "csv" in formats else None
        self.writer = _summary_writer() if "tensorboard" in formats else None
        self.board = None

    @contextlib.contextmanager
    def open(self, history: History) -> Iterator[None]:
        """Write the epochs of ``history``; within this context more can be added."""
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
        """Add the last epoch."""
        if self.table:
            self._write_table(history)
        if self.board:
            self._add_scalars(history.entries[-1])
            self.board.flush()

    def _write_table(self, history: History) -> None:
        """Write ``summary.csv`` with timm's columns; epochs count from 1."""

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
