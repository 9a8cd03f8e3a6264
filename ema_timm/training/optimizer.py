"""Optimiser and learning-rate schedule, by timm's names."""

import contextlib
from collections.abc import Iterator

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ema_timm.errors import UserError
from ema_timm.training.settings import FinetuneConfig


def create_optimizer(config: FinetuneConfig, model: nn.Module) -> Optimizer:
    """The optimiser of a run, over the parameters of ``model``.

    Raises:
        UserError: If timm does not know it, or it does not take the settings.
    """
    with _refusals(f"--opt {config.opt}"):
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay or None,
        )


def create_scheduler(
    config: FinetuneConfig, optimizer: Optimizer, steps: int, epochs: int
) -> Scheduler:
    """The schedule of the learning rate, which moves with every step.

    Args:
        config: The run's settings.
        optimizer: Whose learning rate it sets.
        steps: Steps in an epoch.
        epochs: Its length.

    Raises:
        UserError: If timm does not know it, or it does not take the settings.
    """
    option = f"--sched {config.sched}"
    with _refusals(option):
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
        raise UserError(f"timm has no scheduler for {option}; cosine, step and poly are some.")
    return scheduler


@contextlib.contextmanager
def _refusals(option: str) -> Iterator[None]:
    """What timm raises about an option, its assertions too, as one line."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {option}: {error}") from error
