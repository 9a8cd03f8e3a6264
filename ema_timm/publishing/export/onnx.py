"""ONNX, by either of PyTorch's exporters, and ONNX Runtime to read it back."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ema_timm.publishing.export.network import FREE_AXES


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
