"""Time the implementations of EMA attention on a GPU, and remember the fastest for "auto"."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.tuning.tuner import tune
else:
    __getattr__, __dir__ = lazy_names(__name__, {"tune": "tuner"})

__all__ = ["tune"]
