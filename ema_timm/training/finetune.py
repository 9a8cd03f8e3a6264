"""Fine-tuning: an image folder and a timm name -> a checkpoint folder in timm's Hub format.

Loader, augmentation, optimiser, scheduler, losses and metrics are timm's. An interrupted run
continues exactly: every epoch is seeded by (seed, epoch, process), and a run that was asked to
stop saves the step it stopped at together with the generators' states.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator

import torch
from timm.utils import dispatch_clip_grad, distribute_bn
from timm.utils.distributed import init_distributed_device_so
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.results import FORMAT, PREPROCESSING
from ema_timm.errors import InterruptedRunError, UserError
from ema_timm.measure.device import pick_device
from ema_timm.measure.metrics import Metrics, autocast, measure, sum_over_processes
from ema_timm.measure.versions import versions
from ema_timm.training.parts import (
    check_same_run,
    check_settings,
    describe_data,
    loaders,
    mixup_and_loss,
    open_data,
    optimizer_and_scheduler,
    public_arguments,
)
from ema_timm.training.seeds import get_rng_state, seed_everything, set_rng_state
from ema_timm.training.settings import FinetuneConfig
from ema_timm.training.start import create_model, describe_base, known_descriptions
from ema_timm.training.state import RunState
from ema_timm.training.stop import Stop, stop_on_signal

try:
    from ema_timm.training.curves import save_curves
except ImportError:  # matplotlib is an extra; the run says so when it starts
    save_curves = None


def finetune(config: FinetuneConfig, resume: bool = False, progress: bool = True) -> dict:
    """Fine-tune a timm model on an image folder.

    Args:
        config: The run's settings. With ``resume`` they must be those of the interrupted run.
        resume: Continue the run in ``config.output``.
        progress: Show bars (on a terminal) and a line an epoch on stderr.

    Returns:
        The content of results.json, for the weights of the best epoch.

    Raises:
        UserError: For bad input; nothing was written that was not there.
        InterruptedRunError: After Ctrl-C or SIGTERM; ``resume`` continues.
    """
    world = init_distributed_device_so(device=pick_device(config.device))
    try:
        run = _Run(config, resume, world, progress)
        with stop_on_signal() as stop:
            results = run.train(stop)
        if world["distributed"]:
            torch.distributed.barrier()  # leave together: the main process may still be writing
        return results
    finally:
        if world["distributed"]:
            torch.distributed.destroy_process_group()


class _Run:
    """One run: what it is made of, the loop, and what it saves."""

    def __init__(self, config: FinetuneConfig, resume: bool, world: dict, progress: bool):
        self.config = config
        self.rank, self.world_size = world["global_rank"], world["world_size"]
        self.main = self.rank == 0
        self.progress = progress and self.main
        self.device = torch.device(world["device"])
        self.amp_dtype = getattr(torch, config.amp_dtype) if config.amp else None
        check_settings(config)
        self.folder, self.saved = CheckpointWriter(config.output), RunState(config.output)
        self.train_data, self.val_data = open_data(config, self.progress)
        # Once: the fingerprints in it look at every image file.
        self.identity = self._identity()
        self.state = None
        if self.main:
            self.saved.prepare(resume)
        if world["distributed"]:
            torch.distributed.barrier()
        if resume:
            self.state = self.saved.load()
            check_same_run(self.state, self.identity)
        self._build()
        if self.state:
            self._restore(self.state)

    def _build(self) -> None:
        config = self.config
        seed_everything(config.seed, 0, 0)  # the same start on every process
        self.classes = self.train_data.class_names
        # A run that continues gets all its weights from its state.
        self.model, self.model_args = create_model(
            config, len(self.classes), fetch_weights=self.state is None
        )
        self.base = describe_base(self.model, config)
        self.descriptions = known_descriptions(self.model, self.classes)
        self.data_config = preprocessing(
            self.model, self.model_args, {"img_size": config.img_size or None}
        )
        self.macs = count_macs(self.model, self.data_config["input_size"])
        for dataset in (self.train_data, self.val_data):
            dataset.read_channels(self.data_config["input_size"][0])
        self.model.to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.train_loader, self.val_loader = loaders(
            config, self.train_data, self.val_data, self.data_config, self.device, self.world_size
        )
        self.steps = len(self.train_loader)
        if self.steps == 0:
            raise UserError(
                f"--batch-size {config.batch_size} on {self.world_size} process(es) is more than "
                f"the {len(self.train_data)} training images. Use a smaller batch."
            )
        self.optimizer, self.scheduler = optimizer_and_scheduler(config, self.model, self.steps)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        self.mixup, self.loss_fn = mixup_and_loss(config, len(self.classes))
        self.ddp = self.model
        if self.world_size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.model, device_ids=ids)
        self.epoch, self.step, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0
        self.history, self.best, self.rng = [], None, None

    def train(self, stop: Stop) -> dict:
        """Run the remaining epochs, saving after each."""
        if self.progress:
            self._announce()
        while self.epoch < self.config.epochs:
            loss = self._train_epoch(stop)
            if self.world_size > 1:
                distribute_bn(self.model, self.world_size, reduce=True)
            metrics = self._evaluate()
            self.epoch += 1
            self._record(loss, metrics)
            self.step, self.loss_sum, self.seconds, self.rng = 0, 0.0, 0.0, None
            if self.main:
                self._save_epoch()
            if stop.requested and self.epoch < self.config.epochs:
                raise self._interrupted()
        return self.results()

    def _train_epoch(self, stop: Stop) -> float:
        """Train the rest of an epoch; returns its mean loss."""
        seed_everything(self.config.seed, self.epoch + 1, self.rank)
        if self.world_size > 1:
            self.train_loader.sampler.set_epoch(self.epoch)
        self.ddp.train()
        started = time.perf_counter() - self.seconds
        batches = iter(self.train_loader)
        bar = tqdm(
            total=self.steps,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            disable=None if self.progress else True,
            leave=False,
        )
        with bar:
            for _ in range(self.step):  # the images that an interrupted epoch has seen
                next(batches)
                bar.update()
            if self.rng is not None:
                set_rng_state(self.rng)
            while self.step < self.steps:
                batch = self._next_batch(batches, stop, started)
                self.loss_sum += self.train_step(*batch)
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{self.loss_sum / self.step:.3f}", refresh=False)
                self._stop_here(stop, started)
        self.seconds = time.perf_counter() - started
        total = torch.tensor([self.loss_sum, self.step], dtype=torch.float64)
        total = sum_over_processes(total, self.device)
        return float(total[0] / total[1])

    def _next_batch(self, batches: Iterator, stop: Stop, started: float):
        try:
            return next(batches)
        except RuntimeError:
            # Ctrl-C reaches the loader's processes too, and ends them.
            self._stop_here(stop, started)
            raise

    def _stop_here(self, stop: Stop, started: float) -> None:
        """Save and leave, if asked to; between two steps, so that nothing is half done.

        Several processes get the signal at different steps; they leave without saving, and the
        epoch is repeated from its start, with the same outcome.
        """
        if not stop.requested or self.step == self.steps:
            return
        if self.world_size == 1:
            self.rng = get_rng_state()
            self.seconds = time.perf_counter() - started
            self.saved.save(self._state())
        raise self._interrupted()

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped; continue with: ema-timm finetune --resume --output {self.config.output}"
        )

    def train_step(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """One optimiser step; returns the loss."""
        memory_format = (
            torch.channels_last if self.config.channels_last else torch.contiguous_format
        )
        images = images.to(self.device, memory_format=memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        done = self.epoch * self.steps + self.step
        self.scheduler.step_update(num_updates=done)
        with autocast(self.device, self.amp_dtype):
            loss = self.loss_fn(self.ddp(images), targets)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} in epoch {self.epoch + 1}. Use a smaller --lr, "
                "--clip-grad 1, or --amp-dtype bfloat16."
            )
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def _evaluate(self) -> Metrics:
        images = len(self.val_data)
        return measure(
            self.model,
            self.val_loader,
            self.device,
            amp_dtype=self.amp_dtype,
            channels_last=self.config.channels_last,
            images_here=math.ceil((images - self.rank) / self.world_size),
            progress=self.progress,
        )

    def _record(self, loss: float, metrics: Metrics) -> None:
        entry = {"epoch": self.epoch, "train_loss": loss, "seconds": round(self.seconds, 2)}
        entry |= metrics._asdict()
        self.history.append(entry)
        self.improved = self.best is None or metrics.top1 > self.best["top1"]
        if self.improved:
            self.best = entry
        if self.progress:
            tqdm.write(
                f"epoch {self.epoch}/{self.config.epochs}  train loss {loss:.4f}  "
                f"top-1 {metrics.top1:.2f}% of {metrics.images} images  "
                f"(best {self.best['top1']:.2f}%)  {self.seconds:.1f} s",
                file=sys.stderr,
            )

    def _save_epoch(self) -> None:
        """Write the checkpoint of the best epoch, then the state that the next one starts from.

        In this order a run that is killed in between repeats the epoch and writes the same.
        """
        if self.improved:
            self.best["weights_sha256"] = self.folder.save_model(
                self.model, self.model_args, self.data_config, self.classes, self.descriptions
            )
        results = self.results()
        self.folder.write_json("results.json", results)
        self.folder.write_text("README.md", card_text(results))
        if save_curves is not None:
            self.folder.write("curves.png", lambda path: save_curves(self.history, path))
        self.saved.save(self._state())

    def results(self) -> dict:
        """The content of results.json."""
        best = self.best
        return {
            "format": FORMAT,
            "architecture": self.model.pretrained_cfg["architecture"],
            "base": self.base,
            "task": "image-classification",
            "metrics": {key: best[key] for key in Metrics._fields},
            "best_epoch": best["epoch"],
            "weights_sha256": best["weights_sha256"] if self.main else None,
            "parameters": count_parameters(self.model),
            "macs": self.macs,
            "classes": self.classes,
            "input": {key: self.data_config[key] for key in PREPROCESSING},
            "data": self.identity["data"],
            "arguments": public_arguments(self.config),
            "history": self.history,
            "plots": [] if save_curves is None else ["curves.png"],
            "device": str(self.device.type),
            "processes": self.world_size,
            "versions": versions(),
        }

    def _identity(self) -> dict:
        """What makes a run this run: all that its outcome depends on."""
        arguments = dataclasses.asdict(self.config)
        return {
            "arguments": {k: v for k, v in arguments.items() if k not in FinetuneConfig.ANYTIME},
            "processes": self.world_size,
            "data": {
                "train": describe_data(self.train_data),
                "val": describe_data(self.val_data),
            },
        }

    def _state(self) -> dict:
        return {
            "identity": self.identity,
            "config": dataclasses.asdict(self.config),
            "base": self.base,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "rng": self.rng,
            "history": self.history,
            "best": self.best,
        }

    def _restore(self, state: dict) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise UserError(
                f"cannot resume: the saved weights are of another network "
                f"({lines[0] if lines else error}). Start anew with another --output."
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("base", "epoch", "step", "loss_sum", "seconds", "rng", "history", "best"):
            setattr(self, name, state[name])

    def _announce(self) -> None:
        done = f", from epoch {self.epoch + 1}, step {self.step + 1}" if self.state else ""
        size = "×".join(map(str, self.data_config["input_size"][1:]))
        tqdm.write(
            f"{self.config.model} ({self.base['weights']}), {len(self.classes)} classes, "
            f"{len(self.train_data)} training and {len(self.val_data)} validation images at "
            f"{size}, on {self.device}{done}",
            file=sys.stderr,
        )
        if save_curves is None:
            tqdm.write(
                "no curves.png: matplotlib is missing (pip install 'ema-timm[train]')",
                file=sys.stderr,
            )
