"""Fine-tuning, from the first epoch to the last: train, evaluate, report, save."""

import dataclasses
import math
import sys

from timm.utils import distribute_bn

from ema_timm.errors import InterruptedRunError
from ema_timm.measure.metrics import Metrics, measure
from ema_timm.training.checkpoint import RunCheckpoint
from ema_timm.training.data import create_loaders, open_images, timm_augmentation
from ema_timm.training.epoch import EpochLoop, Position
from ema_timm.training.history import History, epoch_cost
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.lock import lock_run
from ema_timm.training.log import Log, Records
from ema_timm.training.loss import read_class_weights
from ema_timm.training.network import RunNetwork, build_run_network
from ema_timm.training.processes import Process, is_main, join_processes, use_threads
from ema_timm.training.resume import RunState, check_same_run, extends, identify
from ema_timm.training.seeding import RepeatableImages, seed_everything
from ema_timm.training.settings import FinetuneConfig, check_settings
from ema_timm.training.signals import Stop, stop_on_signal
from ema_timm.training.step import TrainStep


def finetune(config: FinetuneConfig, resume: bool = False, progress: bool = True) -> dict:
    """Fine-tune a timm model on an image folder and write a checkpoint folder.

    Args:
        config: The run's settings. With ``resume``, those of the interrupted run.
        resume: Continue the run in ``config.output``. A finished run continues if ``epochs`` is
            larger, as a new run from its last weights.
        progress: Show progress bars (on a terminal) and one line for each epoch on stderr.

    Returns:
        The content of results.json, for the weights of the best epoch.

    Raises:
        UserError: For bad input. Nothing was written.
        HubError: If the Hub does not provide the initial weights, or provides damaged ones.
        InterruptedRunError: After Ctrl-C or SIGTERM. Continue with ``resume``.
    """
    saved = RunState(config.output)
    with lock_run(saved, resume):
        return _train(config, _load(saved) if resume else None, progress)


def continue_run(settings: dict, progress: bool = True) -> dict:
    """Continue an interrupted run with its own settings. Returns and raises as `finetune` does.

    Args:
        settings: ``output``, and settings by name that are confirmed or may change.
        progress: As in `finetune`.
    """
    saved = RunState(settings["output"])
    with lock_run(saved, resume=True):
        state = _load(saved)
        return _train(FinetuneConfig(**{**state["config"], **settings}), state, progress)


def _load(saved: RunState) -> dict:
    state = saved.load()
    if saved.warning and is_main():
        print(saved.warning, file=sys.stderr)
    return state


def _train(config: FinetuneConfig, state: dict | None, progress: bool) -> dict:
    # A run keeps its number of threads, because another number would round sums differently.
    threads = state["identity"].get("threads") if state else None
    with use_threads(threads), join_processes(config.device) as process:
        run = Run(config, state, process, progress and process.main)
        with stop_on_signal() as stop:
            return run.train(stop)


class Run:
    """A run in one of its processes. It unpacks the settings for the parts that it is made of.

    Args:
        config: Its settings.
        state: The state that it continues from; None starts a new run.
        process: This process.
        progress: Show progress bars (on a terminal) and lines on stderr.

    Raises:
        UserError: For bad input. Nothing was written.
        HubError: If the Hub does not provide the initial weights, or provides damaged ones.
    """

    def __init__(
        self, config: FinetuneConfig, state: dict | None, process: Process, progress: bool
    ):
        check_settings(config)
        self.config, self.process, self.progress = config, process, progress
        self.images = open_images(
            config.data_dir,
            config.dataset,
            config.split,
            config.val_split,
            config.output,
            process,
            check=config.check,
            progress=progress,
        )
        class_weights = read_class_weights(config.class_weights, self.images.train)
        # Only once, because the fingerprints read every image file.
        data = self.images.describe()
        self.identity = identify(config, process.count, data, class_weights)
        self.saved = RunState(config.output)
        self.position, self.history = Position(), History()
        self.resumed = state is not None
        self.new_schedule = state is None or extends(state, config.epochs)
        if state:
            check_same_run(state["identity"], self.identity, extended=self.new_schedule)
            done = [state["epoch"]] if self.new_schedule else []
            self.history = History(state["history"], state["best"], state["extended"] + done)
        network = self._build(state["base"] if state else None, class_weights)
        if state:
            self.train_step.load_state_dict(state, weights_only=self.new_schedule)
            fields = dataclasses.fields(Position)
            self.position = Position(**{field.name: state[field.name] for field in fields})
        self.network = dataclasses.replace(network, model=self.train_step.evaluated)
        arguments = dataclasses.asdict(config)
        self.checkpoint = RunCheckpoint(
            arguments, self.network, data, process, class_weights, self.images.identical
        )
        self.records = Records(self.saved.folder, config.record if process.main else ())
        self.log = Log(config.epochs, shown=progress)

    def _build(self, base: dict | None, class_weights: list[float] | None) -> RunNetwork:
        """Build network, loaders and training step. The random numbers depend on their order."""
        config, process = self.config, self.process
        augmentation = timm_augmentation(  # checked before weights are fetched
            config.aa, config.color_jitter, config.hflip, config.reprob, config.scale_min
        )
        seed_everything(config.seed, 0, 0)  # the same initial weights in every process
        network = build_run_network(
            InitialModel(config.model, config.model_kwargs, config.pretrained, config.weights),
            self.images.train.class_names,
            process.device,
            base,
            image_settings=config.image_settings,
            drop_path=config.drop_path,
            channels_last=config.channels_last,
            grad_checkpointing=config.grad_checkpointing,
        )
        self.images.read_channels(network.preprocessing["input_size"][0])
        loader, self.val_loader = create_loaders(
            RepeatableImages(self.images.train, config.seed),
            self.images.val,
            augmentation,
            network.preprocessing,
            process,
            config.batch_size,
            config.workers,
        )
        self.train_step = TrainStep(
            config,
            network.model,
            len(network.classes),
            len(loader),
            process,
            self.history.first_epoch,
            class_weights,
        )
        self.loop = EpochLoop(
            self.train_step, loader, process, config.seed, config.epochs, self.progress
        )
        return network

    def train(self, stop: Stop) -> dict:
        """Train the remaining epochs and save after each.

        Returns:
            The content of results.json.

        Raises:
            InterruptedRunError: When ``stop`` was requested.
        """
        config, history = self.config, self.history
        resumed_at = self.position if self.resumed else None
        self.log.start(
            config.model, self.network, self.images, self.process.device, history, resumed_at
        )
        if self.new_schedule and self.process.main:
            # Before anything else is written, so that the run can resume whenever it is killed.
            if self.position.epoch == 0:
                self.saved.discard()
            self._save_state()
        if history.best and not self._finished and not self.checkpoint.holds(history.best):
            # The run was killed after it had written better weights, but before the state.
            history.best = None
        with self.records.open(history):
            while not self._finished:
                self._epoch(stop)
        if self.position.epoch < config.epochs:
            self.log.stopped_early(history, config.patience)
        return self.checkpoint.results(history)

    @property
    def _finished(self) -> bool:
        all_done = self.position.epoch >= self.config.epochs
        return all_done or self.history.stalled(self.config.patience)

    def _epoch(self, stop: Stop) -> None:
        """Train, evaluate and save one epoch."""
        if not self.loop.run(self.position, stop):
            # The signal reaches several processes at different steps. They leave without saving,
            # and the epoch is repeated from its start, with the same outcome.
            if self.process.count == 1:
                self._save_state()
            raise self._interrupted()
        self._end_epoch()
        if stop.requested and not self._finished:
            raise self._interrupted()

    def _end_epoch(self) -> None:
        """Evaluate, report and save.

        The checkpoint is written before the state that the next epoch starts from. A run that is
        killed in between repeats the epoch and writes the same again (nearly, on a GPU).
        """
        loss, seconds = self.loop.mean_loss(self.position), self.position.seconds
        if self.process.count > 1:
            # In the same order in every process.
            for model in dict.fromkeys((self.train_step.model, self.network.model)):
                distribute_bn(model, self.process.count, reduce=True)
        trained = self.loop.steps * self.config.batch_size * self.process.count
        cost = epoch_cost(trained, seconds, self.process.device)
        metrics = self._evaluate()
        self.position.end_epoch()
        more = {"lr": self.train_step.lr} | cost
        improved = self.history.add(self.position.epoch, loss, seconds, metrics, more)
        self.log.epoch(self.history)
        if self.process.main:
            self.checkpoint.save(self.history, improved)
            self._save_state()
        self.records.epoch(self.history)

    def _evaluate(self) -> Metrics:
        count = len(self.images.val)
        return measure(
            self.network.model,
            self.val_loader,
            self.process.device,
            amp_dtype=self.train_step.amp_dtype,
            channels_last=self.config.channels_last,
            images_here=math.ceil((count - self.process.rank) / self.process.count),
            progress=self.progress,
        )

    def _save_state(self) -> None:
        """Save everything that the rest of the run depends on."""
        self.saved.save(
            {
                "identity": self.identity,
                "config": dataclasses.asdict(self.config),
                "base": self.network.base,
                **self.train_step.state_dict(),
                **vars(self.position),
                "history": self.history.entries,
                "best": self.history.best,
                "extended": self.history.extended,
            }
        )

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped; continue with: ema-timm finetune --resume --output {self.config.output}"
        )
