"""The formats: how each is written, and how its file is opened again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.export.description import write_beside, write_into_onnx
from ema_timm.export.inputs import FREE_AXES
from ema_timm.export.ncnn import open_ncnn, write_ncnn

Runnable = Callable[[Tensor], Tensor]
"""An opened file: from images to logits."""


def write_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    exporter: str = "dynamo",
    free: Mapping[int, str] = FREE_AXES,
) -> None:
    """Write an ONNX file with the input ``x`` and the output ``logits``.

    Args:
        model: A network in inference mode.
        example: An input.
        path: The file.
        exporter: Which of PyTorch's exporters: "dynamo" or "legacy".
        free: Names of the axes whose sizes stay free; the others are fixed to the example's.
    """
    names = {"input_names": ["x"], "output_names": ["logits"]}
    if exporter == "legacy":
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, dynamic_axes={"x": dict(free)}, **names
        )
        return
    dims = {axis: torch.export.Dim(name, max=1 << 15) for axis, name in free.items()}
    program = torch.onnx.export(
        model, (example,), dynamo=True, dynamic_shapes=(dims,), verbose=False, **names
    )
    program.save(str(path), external_data=False)


class OnnxFile:
    """An ONNX file in ONNX Runtime, on the CPU; called with images, it returns logits.

    Args:
        path: The file.

    Attributes:
        metadata: The metadata of the file.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._name = self._session.get_inputs()[0].name
        self.metadata = self._session.get_modelmeta().custom_metadata_map

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of images, (B, C, H, W)."""
        return torch.from_numpy(self._session.run(None, {self._name: x.numpy()})[0])


def open_onnx(path: Path) -> OnnxFile:
    """Open an ONNX file in ONNX Runtime, on the CPU."""
    return OnnxFile(path)


def write_torchscript(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """Write a scripted network. ``example`` and ``free`` are not used, since nothing is traced."""
    torch.jit.script(model).save(str(path))


def write_pt2(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """Write a program of ``torch.export``; the sizes of the axes in ``free`` stay free."""
    shapes = (dict.fromkeys(free, torch.export.Dim.AUTO),)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def open_pt2(path: Path) -> Runnable:
    """Open a program of ``torch.export``."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


class Format(NamedTuple):
    """How a format is written and opened.

    Attributes:
        file: Name of the file in the folder.
        write: ``write(model, example, path, free=...)``, with ``exporter`` if there are several and
            ``fp16`` if there is a choice.
        open: ``open(path)``.
        dialect: The dialect of the EMA layers, as `ready_to_export` names it.
        describe: ``describe(path, description)`` adds the description to the file that was
            written, or None.
        packages: The packages that it needs besides PyTorch.
        extra: The extra of ema-timm that installs them.
        exporters: The packages that each of several exporters needs in addition, by name.
        scriptable: Whether timm must build the network for scripting.
        exportable: Whether timm must build the network for its ONNX export.
        beside: Names of the other files that it consists of.
        one_image: Whether it supports only one image, of one size.
        fp16: Whether it can store the weights in half precision.
    """

    file: str
    write: Callable[..., None]
    open: Callable[[Path], Runnable]
    dialect: str
    describe: Callable[[Path, dict], None] | None = None
    packages: tuple[str, ...] = ()
    extra: str = "export"
    exporters: Mapping[str, tuple[str, ...]] = {}
    scriptable: bool = False
    exportable: bool = False
    beside: tuple[str, ...] = ()
    one_image: bool = False
    fp16: bool = False


FORMATS = {
    "onnx": Format(
        "model.onnx",
        write_onnx,
        open_onnx,
        "onnx",
        write_into_onnx,
        packages=("onnx", "onnxruntime"),
        exporters={"dynamo": ("onnxscript",), "legacy": ()},
        exportable=True,
    ),
    "torchscript": Format(
        "model.torchscript", write_torchscript, torch.jit.load, "pytorch", scriptable=True
    ),
    "pt2": Format("model.pt2", write_pt2, open_pt2, "pytorch"),
    "ncnn": Format(
        "model.ncnn.param",
        write_ncnn,
        open_ncnn,
        "plain",
        write_beside,
        packages=("ncnn", "pnnx"),
        extra="ncnn",
        beside=("model.ncnn.bin", "model.ncnn.json"),
        one_image=True,
        fp16=True,
    ),
}
