"""Time the implementations of EMA attention on a GPU, and remember the fastest for "auto"."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_timm.tuning.tuner import tune

__all__ = ["tune"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ema_timm.tuning import tuner

    return getattr(tuner, name)
