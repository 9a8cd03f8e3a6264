"""A checkpoint folder as one file for deployment: ONNX, TorchScript or ``torch.export``.

The names below are imported when they are first used: PyTorch takes long to load.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_timm.export.formats import FORMATS, open_onnx, write_onnx
    from ema_timm.export.inputs import InputSize
    from ema_timm.export.int8 import quantize_int8
    from ema_timm.export.layers import ready_to_export
    from ema_timm.export.write import export

_HOME = {
    "FORMATS": "formats",
    "InputSize": "inputs",
    "export": "write",
    "open_onnx": "formats",
    "quantize_int8": "int8",
    "ready_to_export": "layers",
    "write_onnx": "formats",
}

__all__ = [
    "FORMATS",
    "InputSize",
    "export",
    "open_onnx",
    "quantize_int8",
    "ready_to_export",
    "write_onnx",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
