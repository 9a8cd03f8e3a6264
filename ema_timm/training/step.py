"""One optimiser step: one or several batches in, better weights out."""

import contextlib
import math
from collections.abc import Iterator

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ema_timm.errors import UserError
from ema_timm.measure.metrics import autocast
from ema_timm.training.initial_weights import Backbone
from ema_timm.training.loss import mixup_and_loss
from ema_timm.training.processes import Process
from ema_timm.training.settings import FinetuneConfig


class TrainStep:
    """Trains a network, one batch at a time.

    Args:
        config: The run's settings. This class uses half of them: optimiser, schedule, loss,
            precision, averaging and freezing.
        model: The classifier, on the device of ``process``.
        num_classes: Number of its outputs.
        steps: Batches in an epoch.
        process: This process. Several processes train one model.
        first_epoch: Epochs done before the schedule begins.
        class_weights: Weights of the classes in the loss.

    Raises:
        UserError: If timm does not know the optimiser or the schedule, or rejects its settings.

    Attributes:
        model: The classifier.
        averaged: A moving average of its weights, in timm's `ModelEmaV3`, or None.
        parallel: The module for the forward pass: the model, in DDP if there are several processes.
            None before the first epoch begins.
        arranged: Whether the buckets of DDP have their final order.
        amp_dtype: Type of mixed precision, or None.
        pending: Whether there are gradients of batches that the weights were not updated by yet.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        num_classes: int,
        steps: int,
        process: Process,
        first_epoch: int = 0,
        class_weights: list[float] | None = None,
    ):
        self.model, self.steps, self.process = model, steps, process
        self.device, self.first_epoch = process.device, first_epoch
        self.batches, self.pending = config.grad_accum_steps, False
        self.updates = math.ceil(steps / self.batches)
        self.channels_last, self.clip_grad = config.channels_last, config.clip_grad
        self.amp_dtype = getattr(torch, config.amp_dtype) if config.amp else None
        self.optimizer = _create_optimizer(config, model)
        epochs = config.epochs - first_epoch
        self.scheduler = _create_scheduler(config, self.optimizer, self.updates, epochs)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.mixup, self.loss_fn = mixup_and_loss(
            num_classes, config.mixup, config.cutmix, config.smoothing, weights
        )
        self.loss_fn.to(self.device)
        self.averaged = None
        if config.average_weights:
            self.averaged = ModelEmaV3(model, decay=config.average_weights)
        self.backbone, self.freeze_epochs = Backbone(model), config.freeze_epochs
        self.parallel = None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved: the average if there is one."""
        return self.averaged.module if self.averaged else self.model

    @property
    def lr(self) -> float:
        """The learning rate, averaged over the parameter groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def begin_epoch(self, epoch: int) -> None:
        """Set training mode, and freeze or unfreeze the backbone.

        Args:
            epoch: Epochs done.
        """
        frozen = epoch < self.freeze_epochs
        if self.parallel is None or frozen != self.backbone.frozen:
            self.backbone.freeze(frozen)
            self.parallel, self.arranged = self._distributed(), self.process.count < 3
        self.parallel.train()
        self.backbone.train()

    def _distributed(self) -> nn.Module:
        """The module for the forward pass.

        DDP expects gradients of the parameters that were trainable when it was created.
        """
        if self.process.count == 1:
            return self.model
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids)

    def _arrange(self, images: Tensor) -> None:
        """Let DDP arrange its buckets, which it does after its first backward pass.

        The buckets decide in which order the gradients of three or more processes are added up.
        Without this extra pass, the first step of a resumed run would round sums differently.
        """
        self.arranged = True
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with autocast(self.device, self.amp_dtype):
                outputs = self.parallel(images)
            outputs.sum().backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def __call__(self, images: Tensor, targets: Tensor, done: int) -> float:
        """Train on one batch. The last batch of a step updates the weights.

        Args:
            images: (B, C, H, W).
            targets: Class numbers, (B,).
            done: Batches that the run has trained on before.

        Returns:
            The loss of the batch.

        Raises:
            UserError: If the loss is not finite.
        """
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if not self.arranged:
            self._arrange(images)
        epoch, batch = divmod(done, self.steps)
        first = batch - batch % self.batches
        count = min(self.batches, self.steps - first)  # the last step may have fewer batches
        last = batch == first + count - 1
        update = (epoch - self.first_epoch) * self.updates + batch // self.batches
        self.scheduler.step_update(num_updates=update)
        with self._synchronization(last):
            with autocast(self.device, self.amp_dtype):
                loss = self.loss_fn(self._outputs(images), targets)
            value = self._checked(loss.item(), epoch)
            if batch == first:
                self.optimizer.zero_grad()
            self.scaler.scale(loss / count).backward()
        self.pending = not last
        if last:
            self._update(update + 1)
        return value

    def _outputs(self, images: Tensor) -> Tensor:
        """The logits, (B, classes).

        Raises:
            UserError: For one value a channel, of which batch norm has no variance.
        """
        try:
            return self.parallel(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {len(images)} image(s) of {images.shape[2]}×{images.shape[3]} pixels "
                "gives a layer one value per channel, whose variance is not defined. Use a larger "
                "--batch-size or --img-size."
            ) from error

    def _checked(self, value: float, epoch: int) -> float:
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} in epoch {epoch + 1}. Use a smaller --lr, "
                "--clip-grad 1, or --amp-dtype bfloat16."
            )
        return value

    def _synchronization(self, last: bool) -> contextlib.AbstractContextManager:
        """Let the processes add up their gradients only in the last batch of a step."""
        if last or self.process.count == 1:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _update(self, update: int) -> None:
        """Update the weights; ``update`` is the number of the step in the schedule."""
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update(self.model, step=update)

    def state_dict(self) -> dict:
        """Everything that the next step depends on, except its batches."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged else None,
            "gradients": self._gradients() if self.pending else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the average, which differ between processes within an epoch.

        Those of the network do so too, but DDP replaces them by those of the main process before
        the next step.
        """
        return dict(self.averaged.module.named_buffers()) if self.averaged else {}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Restore what `buffers` returned."""
        own = self.buffers()
        for name, buffer in buffers.items():
            own[name].copy_(buffer)

    def _gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def load_state_dict(self, state: dict, weights_only: bool = False) -> None:
        """Restore what `state_dict` returned. Ignores other keys.

        Args:
            state: The state.
            weights_only: Restore only the network, not how it was trained.

        Raises:
            UserError: If the state belongs to another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            if weights_only:
                if self.averaged:
                    self.averaged.set(self.model)
                return
            if self.averaged:
                self.averaged.module.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise UserError(
                "cannot resume: the saved weights belong to another network "
                f"({lines[0] if lines else error}). Start a new run with another --output."
            ) from error
        if state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        gradients = state.get("gradients", {})  # the oldest states have no such key
        for name, parameter in self.model.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
        self.pending = bool(gradients)


def _create_optimizer(config: FinetuneConfig, model: nn.Module) -> Optimizer:
    with _timm_errors(f"--opt {config.opt}"):
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay or None,
        )


def _create_scheduler(
    config: FinetuneConfig, optimizer: Optimizer, steps: int, epochs: int
) -> Scheduler:
    """A learning-rate schedule of so many epochs that is updated after every step."""
    option = f"--sched {config.sched}"
    with _timm_errors(option):
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=epochs,
            warmup_epochs=min(config.warmup_epochs, epochs - 1),
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    if scheduler is None:
        raise UserError(f"timm has no scheduler for {option}. Examples: cosine, step, poly.")
    return scheduler


@contextlib.contextmanager
def _timm_errors(option: str) -> Iterator[None]:
    """Turn what timm raises about an option, assertions included, into one line."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {option}: {error}") from error
