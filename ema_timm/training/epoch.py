"""The training loop of an epoch, which can stop after any batch and resume there."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ema_timm.measure.metrics import sum_over_processes
from ema_timm.training.processes import Process
from ema_timm.training.seeding import get_rng_state, seed_everything, set_rng_state
from ema_timm.training.signals import Stop
from ema_timm.training.step import TrainStep


@dataclass
class Position:
    """How far a run is.

    Args:
        epoch: Epochs done.
        step: Batches done in the current epoch.
        loss_sum: Sum of their losses.
        seconds: Time that they took.
        rng: The generators' states after them, if the run stopped there; otherwise None.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    rng: dict | None = None

    def end_epoch(self) -> None:
        """Move to the first batch of the next epoch."""
        self.epoch += 1
        self.step, self.loss_sum, self.seconds, self.rng = 0, 0.0, 0.0, None


class EpochLoop:
    """Trains an epoch.

    Args:
        train_step: Trains on one batch.
        loader: The batches of an epoch.
        process: This process.
        seed: The run's seed.
        epochs: Number of epochs, which the progress bar shows.
        progress: Show a progress bar (on a terminal).
    """

    def __init__(
        self,
        train_step: TrainStep,
        loader: DataLoader,
        process: Process,
        seed: int,
        epochs: int,
        progress: bool = False,
    ):
        self.train_step, self.loader, self.process = train_step, loader, process
        self.seed, self.epochs, self.progress = seed, epochs, progress
        self.steps = len(loader)

    def run(self, position: Position, stop: Stop) -> bool:
        """Train the rest of an epoch and update ``position``.

        Returns:
            Whether the epoch is complete. If not, a stop was requested, and the next call
            continues from ``position``.
        """
        seed_everything(self.seed, position.epoch + 1, self.process.rank)
        self.loader.dataset.epoch = position.epoch
        if self.process.count > 1:
            self.loader.sampler.set_epoch(position.epoch)
        self.train_step.begin_epoch(position.epoch)
        started = time.perf_counter() - position.seconds
        with self._bar(position.epoch) as bar:
            self._steps(position, stop, bar)
        if position.step < self.steps:
            position.rng = get_rng_state()
        position.seconds = time.perf_counter() - started
        return position.step == self.steps

    def _steps(self, position: Position, stop: Stop, bar: tqdm) -> None:
        """Train on the remaining batches until none is left or a stop is requested."""
        batches = iter(self.loader)
        for _ in range(position.step):  # trained on before the interruption
            next(batches)
            bar.update()
        if position.rng is not None:
            set_rng_state(position.rng)
        while position.step < self.steps:
            batch = self._next(batches, stop)
            if batch is None:
                return
            done = position.epoch * self.steps + position.step
            position.loss_sum += self.train_step(*batch, done)
            position.step += 1
            bar.update()
            bar.set_postfix(loss=f"{position.loss_sum / position.step:.3f}", refresh=False)
            if stop.requested:
                return

    def _next(self, batches: Iterator, stop: Stop):
        """The next batch, or None if a requested stop ended the workers."""
        try:
            return next(batches)
        except RuntimeError:
            # Ctrl-C also reaches the data loader workers and ends them.
            if stop.requested:
                return None
            raise

    def mean_loss(self, position: Position) -> float:
        """Mean loss of this epoch's batches, over all processes."""
        total = torch.tensor([position.loss_sum, position.step], dtype=torch.float64)
        total = sum_over_processes(total, self.process.device)
        return float(total[0] / total[1])

    def _bar(self, epoch: int) -> tqdm:
        return tqdm(
            total=self.steps,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            disable=None if self.progress else True,
            leave=False,
        )
