"""One optimiser step: a batch or several in, better weights out."""

import contextlib
import math

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ema_timm.errors import UserError
from ema_timm.measure.metrics import autocast
from ema_timm.training.initial_weights import Backbone
from ema_timm.training.loss import mixup_and_loss
from ema_timm.training.optimizer import create_optimizer, create_scheduler
from ema_timm.training.processes import Process
from ema_timm.training.settings import FinetuneConfig


class TrainStep:
    """A network that learns, a batch at a time.

    Args:
        config: The run's settings.
        model: The classifier, on the device of ``process``.
        num_classes: Its outputs.
        steps: Batches in an epoch.
        process: This process; with others it works on one model.
        first: Epochs done before the schedule begins.
        class_weights: Weights of the classes in the loss.

    Attributes:
        model: The classifier.
        averaged: A moving average of its weights, in timm's `ModelEmaV3`, or None.
        parallel: The same as the forward pass takes it: with others, in PyTorch's DDP.
        amp_dtype: Type of mixed precision, or None.
        pending: Whether the gradients hold batches that no step was made of yet.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        num_classes: int,
        steps: int,
        process: Process,
        first: int = 0,
        class_weights: list[float] | None = None,
    ):
        self.model, self.steps, self.process = model, steps, process
        self.device, self.first = process.device, first
        self.batches, self.pending = config.grad_accum_steps, False
        self.updates = math.ceil(steps / self.batches)
        self.channels_last, self.clip_grad = config.channels_last, config.clip_grad
        self.amp_dtype = getattr(torch, config.amp_dtype) if config.amp else None
        self.optimizer = create_optimizer(config, model)
        self.scheduler = create_scheduler(
            config, self.optimizer, self.updates, config.epochs - first
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.mixup, self.loss_fn = mixup_and_loss(config, num_classes, weights)
        self.loss_fn.to(self.device)
        self.averaged = None
        if config.average_weights:
            self.averaged = ModelEmaV3(model, decay=config.average_weights)
        self.backbone, self.freeze_epochs = Backbone(model), config.freeze_epochs
        self.parallel = None
        self.begin_epoch(first)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and kept: the average, where there is one."""
        return self.averaged.module if self.averaged else self.model

    @property
    def lr(self) -> float:
        """The learning rate, the mean over the groups of parameters."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def begin_epoch(self, epoch: int) -> None:
        """Get ready to learn: training mode, and the backbone frozen or not.

        Args:
            epoch: Epochs done.
        """
        frozen = epoch < self.freeze_epochs
        if self.parallel is None or frozen != self.backbone.frozen:
            self.backbone.freeze(frozen)
            self.parallel = self._distributed()
        self.parallel.train()
        self.backbone.train()

    def _distributed(self) -> nn.Module:
        """The model as the forward pass takes it. DDP waits for what learns when it is made."""
        if self.process.count == 1:
            return self.model
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids)

    def __call__(self, images: Tensor, targets: Tensor, done: int) -> float:
        """Learn from one batch; the weights move with the last of those that make a step.

        Args:
            images: (B, C, H, W).
            targets: Classes, (B,).
            done: Batches that the run has learned from before.

        Returns:
            The loss that the batch had.

        Raises:
            UserError: If the loss is no number any more.
        """
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        epoch, batch = divmod(done, self.steps)
        first = batch - batch % self.batches
        together = min(self.batches, self.steps - first)  # the last step may be of fewer
        last = batch == first + together - 1
        update = (epoch - self.first) * self.updates + batch // self.batches
        self.scheduler.step_update(num_updates=update)
        with self._talk(last):
            with autocast(self.device, self.amp_dtype):
                loss = self.loss_fn(self.parallel(images), targets)
            value = self._checked(loss.item(), epoch)
            if batch == first:
                self.optimizer.zero_grad()
            self.scaler.scale(loss / together).backward()
        self.pending = not last
        if last:
            self._update(update + 1)
        return value

    def _checked(self, value: float, epoch: int) -> float:
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} in epoch {epoch + 1}. Use a smaller --lr, "
                "--clip-grad 1, or --amp-dtype bfloat16."
            )
        return value

    def _talk(self, last: bool) -> contextlib.AbstractContextManager:
        """Where processes need not yet add up their gradients, they keep them to themselves."""
        if last or self.process.count == 1:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _update(self, update: int) -> None:
        """Make a step of the gradients, the one of this number in the schedule."""
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update(self.model, step=update)

    def state_dict(self) -> dict:
        """All that the next step depends on, but for its batches."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged else None,
            "gradients": self._gradients() if self.pending else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _gradients(self) -> dict[str, Tensor]:
        given = self.model.named_parameters()
        return {name: parameter.grad for name, parameter in given if parameter.grad is not None}

    def load_state_dict(self, state: dict, weights_alone: bool = False) -> None:
        """Go on from what `state_dict` gave; other keys are not looked at.

        Args:
            state: What it gave.
            weights_alone: Take over the network, and nothing of how it was trained.

        Raises:
            UserError: If it is of another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            if weights_alone:
                if self.averaged:
                    self.averaged.set(self.model)
                return
            if self.averaged:
                self.averaged.module.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise UserError(
                f"cannot resume: the saved weights are of another network "
                f"({lines[0] if lines else error}). Start anew with another --output."
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        gradients = state.get("gradients", {})  # younger than the first states
        for name, parameter in self.model.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
        self.pending = bool(gradients)
