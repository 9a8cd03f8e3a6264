"""EMA attention in YOLO: by name in a model YAML, into trained detectors, the paper's detectors.

Nothing here imports ultralytics before it is asked for a detector.
"""

_HOME = {
    "EmaAttnRow": "ema_timm.integrations.yolo.layer",
    "inject": "ema_timm.integrations.yolo.injection",
    "load": "ema_timm.integrations.yolo.folder",
    "save_folder": "ema_timm.integrations.yolo.folder",
}

__all__ = ["EmaAttnRow", "inject", "load", "save_folder"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
