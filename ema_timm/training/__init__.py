"""Fine-tuning: an image folder and a timm name in, a checkpoint folder out."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.training.run import continue_run, finetune
    from ema_timm.training.settings import FinetuneConfig
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"FinetuneConfig": "settings", "continue_run": "run", "finetune": "run"}
    )

__all__ = ["FinetuneConfig", "continue_run", "finetune"]
