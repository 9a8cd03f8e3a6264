"""A checkpoint folder as one file for deployment: ONNX, TorchScript or torch.export."""

from ema_timm.export.formats import FORMATS, open_onnx, write_onnx
from ema_timm.export.inputs import InputSize, load
from ema_timm.export.int8 import quantize_int8
from ema_timm.export.layers import ready_to_export
from ema_timm.export.write import export

__all__ = [
    "FORMATS",
    "InputSize",
    "export",
    "load",
    "open_onnx",
    "quantize_int8",
    "ready_to_export",
    "write_onnx",
]
