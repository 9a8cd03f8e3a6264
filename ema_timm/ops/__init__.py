"""The operator: one definition, its exact cheap forms, and the one place that chooses."""

from ema_timm.ops.dispatch import IMPLEMENTATIONS, ema_attention
from ema_timm.ops.weights import EmaWeights

__all__ = [
    "IMPLEMENTATIONS",
    "EmaWeights",
    "ema_attention",
]
