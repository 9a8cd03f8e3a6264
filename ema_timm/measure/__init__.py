"""Metrics of a checkpoint on images."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.measure.evaluation import evaluate
    from ema_timm.measure.settings import EvaluateConfig
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"EvaluateConfig": "settings", "evaluate": "evaluation"}
    )

__all__ = ["EvaluateConfig", "evaluate"]
