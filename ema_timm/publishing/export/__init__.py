"""A checkpoint folder as one file for deployment: ONNX, TorchScript or torch.export."""

from ema_timm.publishing.export.formats import FORMATS
from ema_timm.publishing.export.int8 import quantize_int8
from ema_timm.publishing.export.layer import ready_to_export
from ema_timm.publishing.export.network import InputSize, load
from ema_timm.publishing.export.onnx import open_onnx, write_onnx
from ema_timm.publishing.export.write import export

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
