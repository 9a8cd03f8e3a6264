"""Optimiser and learning-rate schedule, by timm's names."""

import contextlib
from collections.abc import Iterator

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ema_timm.errors import UserError


def create_optimizer(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    layer_decay: float,
) -> Optimizer:
    """Create an optimiser for the parameters of ``model``.

    Args:
        model: The network.
        opt: timm's name of the optimiser.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        momentum: Momentum, for optimisers that have one.
        layer_decay: Layer-wise learning rate decay; 0 turns it off.

    Raises:
        UserError: If timm does not know the optimiser, or it rejects the settings.
    """
    with _timm_errors(f"--opt {opt}"):
        return create_optimizer_v2(
            model,
            opt=opt,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            layer_decay=layer_decay or None,
        )


def create_scheduler(
    optimizer: Optimizer, sched: str, steps: int, epochs: int, warmup_epochs: int, min_lr: float
) -> Scheduler:
    """Create a learning-rate schedule that is updated after every step.

    Args:
        optimizer: The optimiser whose learning rate it sets.
        sched: timm's name of the scheduler.
        steps: Steps in an epoch.
        epochs: Length of the schedule.
        warmup_epochs: Epochs of linear warm-up.
        min_lr: Learning rate at the end.

    Raises:
        UserError: If timm does not know the scheduler, or it rejects the settings.
    """
    option = f"--sched {sched}"
    with _timm_errors(option):
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=epochs,
            warmup_epochs=min(warmup_epochs, epochs - 1),
            min_lr=min_lr,
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
