"""EMA attention in YOLO: by name in a model YAML, into trained detectors, the paper's detectors.

Nothing here imports ultralytics before a detector is needed.
"""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.integrations.yolo.detector import all_but_attention
    from ema_timm.integrations.yolo.folder import load, save_folder
    from ema_timm.integrations.yolo.injection import inject
    from ema_timm.integrations.yolo.inside import EmaAttnInside
    from ema_timm.integrations.yolo.layer import EmaAttnRow
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "EmaAttnInside": "inside",
            "EmaAttnRow": "layer",
            "all_but_attention": "detector",
            "inject": "injection",
            "load": "folder",
            "save_folder": "folder",
        },
    )

__all__ = [
    "EmaAttnInside",
    "EmaAttnRow",
    "all_but_attention",
    "inject",
    "load",
    "save_folder",
]
