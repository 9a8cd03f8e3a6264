"""Class labels of images, and pictures of where EMA attention looks in them."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.see.attention import attend
    from ema_timm.see.classify import predict
    from ema_timm.see.gates import attention_maps
    from ema_timm.see.settings import AttendConfig, PredictConfig
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AttendConfig": "settings",
            "PredictConfig": "settings",
            "attend": "attention",
            "attention_maps": "gates",
            "predict": "classify",
        },
    )

__all__ = ["AttendConfig", "PredictConfig", "attend", "attention_maps", "predict"]
