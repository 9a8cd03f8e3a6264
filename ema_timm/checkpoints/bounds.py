"""Bounds on the networks that a config.json or the arguments in a checkpoint can ask timm for."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ema_timm.errors import UserError

MOST_MODULES = 10_000
"""Modules of a network. The largest of timm have two thousand."""

LARGEST_SUM = 1_000_000
"""Sum of all numbers in the arguments. timm makes lists of such a length before any layer."""


RESERVED = (
    *("num_classes", "pretrained", "checkpoint_path", "pretrained_cfg_overlay"),
    *("features_only", "out_indices", "scriptable", "exportable", "no_jit"),
)
"""Arguments of `timm.create_model` that are not of a classifier, or that other options set."""


def given_arguments(model_kwargs: dict) -> dict:
    """Arguments of the network from the command line, without those that are None, as in timm.

    Raises:
        UserError: For one of `RESERVED`.
    """
    if wrong := [name for name in model_kwargs if name in RESERVED]:
        raise UserError(
            f"--model-kwargs: {wrong[0]} is not an argument of the network. Leave it out: the "
            "classes come from the images, and the weights from other options."
        )
    return {name: value for name, value in model_kwargs.items() if value is not None}


def check_arguments(arguments: Any) -> None:
    """Raise ValueError for arguments of a network whose numbers are too large."""
    if not _sum(arguments) <= LARGEST_SUM:  # NaN neither
        raise ValueError(f"the numbers in its arguments add up to more than {LARGEST_SUM:,}")


def _sum(value: Any) -> float:
    if isinstance(value, dict):
        return sum(map(_sum, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_sum, value))
    # An int of hundreds of digits is not a float.
    return min(abs(value), 2 * LARGEST_SUM) if isinstance(value, int | float) else 0


@contextlib.contextmanager
def bounded_network(arguments: Any = None) -> Iterator[None]:
    """Within this context a network of too many modules raises ValueError while it is built.

    Args:
        arguments: Its arguments, which `check_arguments` checks first.
    """
    check_arguments(arguments)
    count = 0

    def on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES:,} modules")

    hook = register_module_module_registration_hook(on_registration)
    try:
        yield
    finally:
        hook.remove()
