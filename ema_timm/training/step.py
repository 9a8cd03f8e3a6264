"""One optimiser step: a batch in, better weights out."""

import math

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ema_timm.errors import UserError
from ema_timm.measure.metrics import autocast
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
        steps: Steps in an epoch.
        process: This process; with others it works on one model.
        first: Epochs done before the schedule begins.

    Attributes:
        model: The classifier.
        parallel: The same as the forward pass takes it: with others, in PyTorch's DDP.
        amp_dtype: Type of mixed precision, or None.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        num_classes: int,
        steps: int,
        process: Process,
        first: int = 0,
    ):
        self.model, self.steps, self.device = model, steps, process.device
        self.channels_last, self.clip_grad = config.channels_last, config.clip_grad
        self.amp_dtype = getattr(torch, config.amp_dtype) if config.amp else None
        self.optimizer = create_optimizer(config, model)
        self.scheduler = create_scheduler(config, self.optimizer, steps, config.epochs - first)
        self.first_step = first * steps
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        self.mixup, self.loss_fn = mixup_and_loss(config, num_classes)
        self.parallel = model
        if process.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, device_ids=ids)

    def __call__(self, images: Tensor, targets: Tensor, done: int) -> float:
        """Learn from one batch.

        Args:
            images: (B, C, H, W).
            targets: Classes, (B,).
            done: Steps that the run has made before.

        Returns:
            The loss that the batch had before the step.

        Raises:
            UserError: If the loss is no number any more.
        """
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        self.scheduler.step_update(num_updates=done - self.first_step)
        with autocast(self.device, self.amp_dtype):
            loss = self.loss_fn(self.parallel(images), targets)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} in epoch {done // self.steps + 1}. Use a smaller --lr, "
                "--clip-grad 1, or --amp-dtype bfloat16."
            )
        self._update(loss)
        return value

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict:
        """All that the next step depends on, but for its batch."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

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
                return
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise UserError(
                f"cannot resume: the saved weights are of another network "
                f"({lines[0] if lines else error}). Start anew with another --output."
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
