"""The name under which the README first gave `ema_timm.integrations.detection`; it stays."""

from ema_timm.integrations.detection import load_backbone_weights

__all__ = ["load_backbone_weights"]
