"""The formats: one line each; how a format is written and read back stands in its own file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.publishing.export.onnx import open_onnx, write_onnx
from ema_timm.publishing.export.torch_export import open_pt2, write_pt2
from ema_timm.publishing.export.torchscript import write_torchscript

Run = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """How a format is written and read back.

    Attributes:
        file: Name in the folder.
        write: ``write(model, example, path)``, and ``exporter`` where there are several.
        open: ``open(path)`` gives a function of the input.
        packages: What it needs beyond PyTorch.
        exporters: What each of several exporters needs on top of that, by name.
        scriptable: Whether timm must make the network for scripting.
        exportable: Whether timm must make the network for its ONNX export.
    """

    file: str
    write: Callable[..., None]
    open: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    exporters: Mapping[str, tuple[str, ...]] = {}
    scriptable: bool = False
    exportable: bool = False


FORMATS = {
    "onnx": Format(
        "model.onnx",
        write_onnx,
        open_onnx,
        packages=("onnx", "onnxruntime"),
        exporters={"dynamo": ("onnxscript",), "legacy": ()},
        exportable=True,
    ),
    "torchscript": Format("model.torchscript", write_torchscript, torch.jit.load, scriptable=True),
    "pt2": Format("model.pt2", write_pt2, open_pt2),
}
