"""A checkpoint folder as a file for deployment: ONNX, TorchScript, ``torch.export`` or ncnn.

The names below are imported when they are first used: PyTorch takes long to load.
"""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.export.formats import FORMATS, open_onnx, write_onnx
    from ema_timm.export.inputs import InputSize
    from ema_timm.export.int8 import quantize_int8
    from ema_timm.export.layers import ready_to_export
    from ema_timm.export.write import export
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "FORMATS": "formats",
            "InputSize": "inputs",
            "export": "write",
            "open_onnx": "formats",
            "quantize_int8": "int8",
            "ready_to_export": "layers",
            "write_onnx": "formats",
        },
    )

__all__ = [
    "FORMATS",
    "InputSize",
    "export",
    "open_onnx",
    "quantize_int8",
    "ready_to_export",
    "write_onnx",
]
