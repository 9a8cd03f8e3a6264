"""A run from its first epoch to its last: train, measure, note, save."""

import dataclasses
import math
import sys

from timm.utils import distribute_bn

from ema_timm.errors import InterruptedRunError
from ema_timm.measure.metrics import Metrics, measure
from ema_timm.training.checkpoint import RunCheckpoint
from ema_timm.training.data import open_images
from ema_timm.training.epoch import EpochLoop, Position
from ema_timm.training.history import History, epoch_cost
from ema_timm.training.lock import lock_run
from ema_timm.training.log import Log, Records
from ema_timm.training.loss import class_weights
from ema_timm.training.parts import assemble, restore, snapshot
from ema_timm.training.processes import Process, is_main, join_processes, use_threads
from ema_timm.training.resume import RunState, check_same_run, extends, identify
from ema_timm.training.settings import FinetuneConfig, check_settings
from ema_timm.training.signals import Stop, stop_on_signal


class Run:
    """A run in one of its processes.

    Args:
        config: Its settings.
        state: What it continues from; without one it starts.
        process: This process.
        progress: Show bars (on a terminal) and lines on stderr.

    Raises:
        UserError: For bad input; nothing was written that was not there.
        HubError: If the Hub does not give the weights, or gives them damaged.
    """

    def __init__(
        self, config: FinetuneConfig, state: dict | None, process: Process, progress: bool
    ):
        check_settings(config)
        self.config, self.process, self.progress = config, process, progress
        self.images = open_images(config, process, progress)
        # Once: the fingerprints in it look at every image file.
        weights = class_weights(config.class_weights, self.images.train)
        self.identity = identify(config, process.count, self.images.describe(), weights)
        self.saved = RunState(config.output)
        self.position, self.history = Position(), History()
        self.starts = state is None or extends(state, config)
        if state:
            check_same_run(state["identity"], self.identity, extended=self.starts)
            done = [state["epoch"]] if self.starts else []
            self.history = History(state["history"], state["best"], state["extended"] + done)
        base = state["base"] if state else None
        self.parts = assemble(config, self.images, process, base, self.history.first, weights)
        if state:
            self.position = restore(state, self.parts, weights_alone=self.starts)
        train_step = self.parts.train_step
        self.network = dataclasses.replace(self.parts.network, model=train_step.evaluated)
        self.loop = EpochLoop(config, train_step, self.parts.train_loader, process, progress)
        self.checkpoint = RunCheckpoint(
            config, self.network, self.identity["data"], process, weights
        )
        self.records = Records(config, process.main)
        self.log = Log(config, resumed=state is not None, shown=progress)

    def train(self, stop: Stop) -> dict:
        """Train the epochs that are left, saving after each.

        Returns:
            The content of results.json.

        Raises:
            InterruptedRunError: When ``stop`` was requested.
        """
        device, best = self.process.device, self.history.best
        self.log.start(self.network, self.images, device, self.position, self.history)
        if self.starts and self.process.main:
            # Before anything else, so that whatever the run is killed at it can continue.
            if self.position.epoch == 0:
                self.saved.discard()
            self._save_state()
        if best and not self._finished and not self.checkpoint.holds(best):
            # The run was killed after it had written better weights, and before it said so.
            self.history.best = None
        with self.records.open(self.history):
            self._epochs(stop)
        if self.position.epoch < self.config.epochs:
            self.log.stopped_early(self.history)
        return self.checkpoint.results(self.history)

    @property
    def _finished(self) -> bool:
        all_done = self.position.epoch >= self.config.epochs
        return all_done or self.history.stalled(self.config.patience)

    def _epochs(self, stop: Stop) -> None:
        """The epochs that are left."""
        while not self._finished:
            if not self.loop.run(self.position, stop):
                # Several processes get the signal at different steps: they leave without saving,
                # and the epoch is repeated from its start, with the same outcome.
                if self.process.count == 1:
                    self._save_state()
                raise self._interrupted()
            self._end_epoch()
            if stop.requested and not self._finished:
                raise self._interrupted()

    def _end_epoch(self) -> None:
        """Measure, note and save.

        The checkpoint comes before the state that the next epoch starts from: a run that is
        killed in between repeats the epoch and writes the same (on a GPU nearly the same).
        """
        loss, seconds = self.loop.mean_loss(self.position), self.position.seconds
        if self.process.count > 1:
            # In one order on every process.
            for model in dict.fromkeys((self.parts.network.model, self.network.model)):
                distribute_bn(model, self.process.count, reduce=True)
        trained = self.loop.steps * self.config.batch_size * self.process.count
        cost = epoch_cost(trained, seconds, self.process.device)
        metrics = self._measure()
        self.position.end_epoch()
        notes = {"lr": self.parts.train_step.lr} | cost
        improved = self.history.add(self.position.epoch, loss, seconds, metrics, notes)
        self.log.epoch(self.history)
        if self.process.main:
            self.checkpoint.save(self.history, improved)
            self._save_state()
        self.records.epoch(self.history)

    def _measure(self) -> Metrics:
        count = len(self.images.val)
        return measure(
            self.network.model,
            self.parts.val_loader,
            self.process.device,
            amp_dtype=self.parts.train_step.amp_dtype,
            channels_last=self.config.channels_last,
            images_here=math.ceil((count - self.process.rank) / self.process.count),
            progress=self.progress,
        )

    def _save_state(self) -> None:
        state = snapshot(self.config, self.identity, self.parts, self.position, self.history)
        self.saved.save(state)

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped; continue with: ema-timm finetune --resume --output {self.config.output}"
        )


# MERGED: Fine-tuning: an image folder and a timm name -> a checkpoint folder in timm's Hub format.
def finetune(config: FinetuneConfig, resume: bool = False, progress: bool = True) -> dict:
    """Fine-tune a timm model on an image folder.

    Args:
        config: The run's settings. With ``resume`` they must be those of the interrupted run.
        resume: Continue the run in ``config.output``; one that is finished too, if ``epochs`` are
            more, as a new run from its last weights.
        progress: Show bars (on a terminal) and a line an epoch on stderr.

    Returns:
        The content of results.json, for the weights of the best epoch.

    Raises:
        UserError: For bad input; nothing was written that was not there.
        HubError: If the Hub does not give the weights to start from, or gives them damaged.
        InterruptedRunError: After Ctrl-C or SIGTERM; ``resume`` continues.
    """
    saved = RunState(config.output)
    with lock_run(saved, resume):
        return _train(config, _read(saved) if resume else None, progress)


def continue_run(given: dict, progress: bool = True) -> dict:
    """Continue an interrupted run with its own settings; returns and raises as `finetune` does.

    Args:
        given: Settings by name: ``output``, and those that are to be said again or may differ.
        progress: As in `finetune`.
    """
    saved = RunState(given["output"])
    with lock_run(saved, resume=True):
        state = _read(saved)
        return _train(FinetuneConfig(**{**state["config"], **given}), state, progress)


def _read(saved: RunState) -> dict:
    state = saved.load()
    if saved.trouble and is_main():
        print(saved.trouble, file=sys.stderr)
    return state


def _train(config: FinetuneConfig, state: dict | None, progress: bool) -> dict:
    # The sums of another number of threads are rounded otherwise: a run keeps its own.
    threads = state["identity"].get("threads") if state else None
    with use_threads(threads), join_processes(config.device) as process:
        run = Run(config, state, process, progress and process.main)
        with stop_on_signal() as stop:
            return run.train(stop)
