"""The training loop of an epoch, which can stop after any batch and resume there."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from ema_timm.measure.metrics import sum_over_processes
from ema_timm.training.processes import Process
from ema_timm.training.seeding import get_rng_state, seed_everything, set_rng_state
from ema_timm.training.signals import start_workers
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
        self.order = loader.batch_sampler.sampler = _Order(loader.sampler)

    def run(self, position: Position, requested: Callable[[], bool]) -> bool:
        """Train the rest of an epoch and update ``position``.

        Args:
            position: Where to start; not at the end of the epoch.
            requested: Whether to stop. Called after every step that updates the weights, by all
                processes; a run of one process calls it after every batch.

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
            self._steps(position, requested, bar)
        if position.step < self.steps:
            position.rng = get_rng_state()
        position.seconds = time.perf_counter() - started
        return position.step == self.steps

    def _steps(self, position: Position, requested: Callable[[], bool], bar: tqdm) -> None:
        """Train on the remaining batches until none is left or a stop is requested."""
        self.order.skipped = position.step * self.loader.batch_size
        with closing(start_workers(self.loader)) as batches:
            self._train(batches, position, requested, bar)

    def _train(
        self, batches: Iterator, position: Position, requested: Callable[[], bool], bar: tqdm
    ) -> None:
        first = next(batches)  # draws the order of the epoch
        bar.update(position.step)
        if position.rng is not None:
            set_rng_state(position.rng)
        for batch in chain([first], batches):
            done = position.epoch * self.steps + position.step
            position.loss_sum += self.train_step(*batch, done)
            position.step += 1
            bar.update()
            bar.set_postfix(loss=f"{position.loss_sum / position.step:.3f}", refresh=False)
            between = self.process.count == 1 or not self.train_step.pending
            if between and position.step < self.steps and requested():
                return

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


class StoppableBatches:
    """The batches of a loader, between which an evaluation can stop.

    Args:
        loader: The loader.
        requested: Whether to stop; called after every batch, by all processes.
        leave: Raises the error to stop with.
    """

    def __init__(self, loader: DataLoader, requested: Callable[[], bool], leave: Callable):
        self.loader, self.requested, self.leave = loader, requested, leave

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        with closing(start_workers(self.loader)) as batches:
            for batch in batches:
                yield batch
                if self.requested():
                    self.leave()


class _Order(Sampler):
    """The order of a sampler without its first images, which are skipped without being read.

    Args:
        sampler: The sampler.

    Attributes:
        skipped: How many images the next iteration skips.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.skipped = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return islice(self.sampler, self.skipped, None)
