"""The operator: one definition, its exact cheap forms, and the one place that chooses."""

from ema_timm.ops.dispatch import IMPLEMENTATIONS, ema_attention, folded_ema_attention
from ema_timm.ops.weights import EmaWeights, FoldedWeights

__all__ = [
    "IMPLEMENTATIONS",
    "EmaWeights",
    "FoldedWeights",
    "ema_attention",
    "folded_ema_attention",
]
