"""The formats: one line each; how a format is written and read back stands in its own file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.export.inputs import FREE_AXES

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


# MERGED: ONNX, by either of PyTorch's exporters, and ONNX Runtime to read it back.
def write_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    exporter: str = "dynamo",
    free: Mapping[int, str] = FREE_AXES,
) -> None:
    """An ONNX file with the input ``x`` and the output ``logits``.

    Args:
        model: A network in inference mode.
        example: An input.
        path: The file.
        exporter: "dynamo" or "legacy".
        free: Names of the axes whose sizes stay free; the others are the example's.
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


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# MERGED: ``torch.export``: the graph of PyTorch's own operators, as a ``.pt2`` file.
def write_pt2(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """An exported program; the sizes of the axes in ``free`` stay free."""
    shapes = (dict.fromkeys(free, torch.export.Dim.AUTO),)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The program of a ``.pt2`` file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


# MERGED: TorchScript: the network's Python, compiled; ``torch.jit.load`` reads it back.
def write_torchscript(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """A scripted network. It is compiled and not traced: ``example`` and ``free`` play no part."""
    torch.jit.script(model).save(str(path))


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
