"""Bounds on the networks that a config.json or the arguments in a checkpoint can ask timm for."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

MOST_MODULES = 10_000
"""Modules of a network. The largest of timm have two thousand."""

LARGEST_SUM = 1_000_000
"""Sum of all numbers in the arguments. timm makes lists of such a length before any layer."""


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
