"""Fine-tuning, from the first epoch to the last: train, evaluate, report, save."""

import dataclasses
import math
from functools import partial

from timm.utils import distribute_bn

from ema_timm.errors import InterruptedRunError, ReportedError
from ema_timm.measure.metrics import Metrics, measure
from ema_timm.training.checkpoint import RunCheckpoint
from ema_timm.training.data import create_loaders, open_images, timm_augmentation
from ema_timm.training.epoch import EpochLoop, Position, StoppableBatches
from ema_timm.training.history import History, epoch_cost
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.lock import open_run
from ema_timm.training.log import Log, Records
from ema_timm.training.loss import read_class_weights
from ema_timm.training.network import RunNetwork, build_run_network
from ema_timm.training.processes import Process, SharedNumber, join_processes, use_threads
from ema_timm.training.resume import RunState, check_same_run, extends, identify, spread
from ema_timm.training.seeding import RepeatableImages, seed_everything
from ema_timm.training.settings import FinetuneConfig, check_settings
from ema_timm.training.signals import Stop, stop_on_signal
from ema_timm.training.step import TrainStep


def finetune(config: FinetuneConfig, resume: bool = False, progress: bool = True) -> dict:
    """Fine-tune a timm model on an image folder and write a checkpoint folder.

    Args:
        config: The run's settings. With ``resume``, those of the interrupted run.
        resume: Continue the run in ``config.output``, if there is one. A finished run continues
            if ``epochs`` is larger, as a new run from its last weights.
        progress: Show progress bars (on a terminal) and one line for each epoch on stderr.

    Returns:
        The content of results.json, for the weights of the best epoch.

    Raises:
        UserError: For bad input. Nothing was written.
        HubError: If the Hub does not provide the initial weights, or provides damaged ones.
        InterruptedRunError: After Ctrl-C or SIGTERM. Continue with ``resume``.

    With several processes, all raise the same error.
    """
    saved = RunState(config.output)
    with join_processes(config.device) as process, open_run(saved, resume, process) as state:
        return _train(config, state, process, progress)


def continue_run(settings: dict, progress: bool = True) -> dict:
    """Continue an interrupted run with its own settings. Returns and raises as `finetune` does.

    Args:
        settings: ``output``, and settings by name that are confirmed or may change.
        progress: As in `finetune`.
    """
    saved = RunState(settings["output"])
    device = settings.get("device") or saved.settings().get("device", "auto")
    with join_processes(device) as process, open_run(saved, True, process) as state:
        if state is None:
            with process.fail_together():
                saved.load()  # says that there is none
        config = FinetuneConfig(**{**state["config"], **settings})
        return _train(config, state, process, progress)


def _train(config: FinetuneConfig, state: dict | None, process: Process, progress: bool) -> dict:
    # A run keeps its number of threads, because another number would round sums differently.
    before = state["identity"] if state else {}
    threads = before.get("threads") if before.get("processes") == process.count else None
    with use_threads(threads):
        with process.fail_together():
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
        self.stopping = SharedNumber(process)
        self.processes_before = process.count
        if state:
            self._restore(state)
        self.network = dataclasses.replace(network, model=self.train_step.evaluated)
        arguments = dataclasses.asdict(config)
        self.checkpoint = RunCheckpoint(
            arguments, self.network, data, process, class_weights, self.images.identical
        )
        self.records = Records(self.saved.folder, config.record if process.main else ())
        self.log = Log(config.epochs, shown=progress)

    def _restore(self, state: dict) -> None:
        """Take the position, the weights and what else the next step depends on from a state."""
        process, self.processes_before = self.process, state["identity"]["processes"]
        if process.count != self.processes_before:
            batches = self.config.grad_accum_steps
            state = spread(state, process.count, self.loop.steps, batches)
        self.train_step.load_state_dict(state, weights_only=self.new_schedule)
        own = (state.get("ranks") or [{}] * process.count)[process.rank]
        if own:
            self.train_step.load_buffers(own["averaged_buffers"])
        fields = [field.name for field in dataclasses.fields(Position)]
        self.position = Position(**{name: own.get(name, state[name]) for name in fields})

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
        if self.processes_before != self.process.count and not self._finished:
            images = config.batch_size * config.grad_accum_steps
            self.log.processes_changed(self.processes_before, self.process.count, images)
        if self.new_schedule and self.process.main:
            # Before anything else is written, so that the run can resume whenever it is killed.
            if self.position.epoch == 0:
                self.saved.discard()
            self._save_state()
        if history.best and not self._finished:
            held = self.process.main and self.checkpoint.holds(history.best)
            if not self.process.broadcast(held):
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
        if self.position.step < self.loop.steps:
            if not self.loop.run(self.position, partial(self._requested, stop)):
                self._leave(stop)
            if self.process.count > 1:
                # In the same order in every process.
                for model in dict.fromkeys((self.train_step.model, self.network.model)):
                    distribute_bn(model, self.process.count, reduce=True)
        self._end_epoch(stop)
        if not self._finished and self._requested(stop):
            raise self._interrupted(stop)

    def _requested(self, stop: Stop) -> bool:
        """Whether a signal requested a stop, in any process. Returns the same in all of them."""
        number = self.stopping(stop.signum)
        if number:
            stop.signum = number
        return number != 0

    def _end_epoch(self, stop: Stop) -> None:
        """Evaluate, report and save.

        The checkpoint is written before the state that the next epoch starts from. A run that is
        killed in between repeats the epoch and writes the same again (nearly, on a GPU).
        """
        loss, seconds = self.loop.mean_loss(self.position), self.position.seconds
        trained = self.loop.steps * self.config.batch_size * self.process.count
        cost = epoch_cost(trained, seconds, self.process.device)
        metrics = self._evaluate(stop)
        self.position.end_epoch()
        more = {"lr": self.train_step.lr} | cost
        improved = self.history.add(self.position.epoch, loss, seconds, metrics, more)
        self.log.epoch(self.history)
        if self.process.main:
            self.checkpoint.save(self.history, improved)
            self._save_state()
        self.records.epoch(self.history)

    def _evaluate(self, stop: Stop) -> Metrics:
        count = len(self.images.val)
        return measure(
            self.network.model,
            StoppableBatches(
                self.val_loader, partial(self._requested, stop), partial(self._leave, stop)
            ),
            self.process.device,
            amp_dtype=self.train_step.amp_dtype,
            channels_last=self.config.channels_last,
            images_here=math.ceil((count - self.process.rank) / self.process.count),
            progress=self.progress,
        )

    def _leave(self, stop: Stop) -> None:
        """Save the position and raise. All processes leave at the same step."""
        position = self.position
        buffers = {name: buffer.cpu() for name, buffer in self.train_step.buffers().items()}
        own = {"loss_sum": position.loss_sum, "rng": position.rng, "averaged_buffers": buffers}
        ranks = self.process.gather(own)
        if self.process.main:
            self._save_state(ranks)
        self.process.wait()
        raise self._interrupted(stop)

    def _save_state(self, ranks: list[dict] | None = None) -> None:
        """Save everything that the rest of the run depends on.

        Args:
            ranks: What differs between the processes, by rank; None between two epochs.
        """
        self.saved.save(
            {
                "identity": self.identity,
                "config": dataclasses.asdict(self.config),
                "base": self.network.base,
                **self.train_step.state_dict(),
                **vars(self.position),
                "steps": self.loop.steps,
                "ranks": ranks,
                "history": self.history.entries,
                "best": self.history.best,
                "extended": self.history.extended,
            }
        )

    def _interrupted(self, stop: Stop) -> InterruptedRunError:
        error = InterruptedRunError(
            f"stopped; continue with: ema-timm finetune --resume --output {self.config.output}",
            stop.signum,
        )
        if not self.process.main:
            error.__cause__ = ReportedError("process 0 of the run reports this error")
        return error
