"""EMA attention in YOLO: by name in a model YAML, into trained detectors, the paper's detectors.

Nothing here imports ultralytics before a detector is needed.
"""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.integrations.yolo.folder import load, save_folder
    from ema_timm.integrations.yolo.injection import inject
    from ema_timm.integrations.yolo.layer import EmaAttnRow
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {"EmaAttnRow": "layer", "inject": "injection", "load": "folder", "save_folder": "folder"},
    )

__all__ = ["EmaAttnRow", "inject", "load", "save_folder"]
