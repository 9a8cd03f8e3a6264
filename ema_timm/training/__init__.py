"""Fine-tuning: an image folder and a timm name in, a checkpoint folder out."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_timm.training.run import continue_run, finetune
    from ema_timm.training.settings import FinetuneConfig
else:
    _MODULES = {"FinetuneConfig": "settings", "continue_run": "run", "finetune": "run"}

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["FinetuneConfig", "continue_run", "finetune"]
