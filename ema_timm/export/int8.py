"""The ONNX file in int8, by ONNX Runtime's dynamic quantisation."""

from pathlib import Path
from typing import NamedTuple

import torch

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.network import open_network
from ema_timm.errors import UserError, require_packages
from ema_timm.export.formats import FORMATS, Runnable, open_onnx
from ema_timm.export.inputs import ALL_FREE, InputSize, check_inputs
from ema_timm.ops.reference import relative_difference

INT8_IMAGES = 32
"""Number of random images on which the int8 file is compared."""


class Quantized(NamedTuple):
    """An int8 file, and its agreement with the float32 file on random images.

    Attributes:
        path: The file.
        difference: Largest difference from the float32 file, relative to its largest output.
        same_class: Number of images with the same most probable class.
        images: Number of images compared.
    """

    path: Path
    difference: float
    same_class: int
    images: int


def quantize_int8(folder: str | Path, fixed: InputSize = ALL_FREE) -> Quantized:
    """Write ``model.int8.onnx`` beside ``model.onnx``.

    Convolutions and the classifier are quantised; the statistics and gates of EMA attention stay
    in float32.

    Args:
        folder: The folder in which `export` has written ``model.onnx``.
        fixed: The sizes to which that file is limited.

    Raises:
        UserError: If the batch is fixed to another size than 1, or a package is missing.
    """
    if fixed.batch not in (None, 1):
        raise UserError(
            f"--int8 compares one image at a time, got --batch-size {fixed.batch}. "
            "Leave it out, or give --batch-size 1."
        )
    require_packages(["onnx", "onnxruntime"], "export")
    run, source = CheckpointWriter(folder), Path(folder) / FORMATS["onnx"].file
    network = open_network(f"local-dir:{folder}")[0]
    size = check_inputs(network, fixed)[0].shape[1:]
    found = []

    def quantize_and_compare(path: Path) -> None:
        """Write to a temporary name; an exception leaves no file."""
        _quantize(source, path)
        found.extend(_agreement(open_onnx(path), open_onnx(source), size))

    run.write("model.int8.onnx", quantize_and_compare)
    return Quantized(run.path / "model.int8.onnx", *found, INT8_IMAGES)


def _quantize(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, path, skip_symbolic_shape=True)
    quantize_dynamic(
        _without_inner_shapes(path),
        path,
        op_types_to_quantize=["Conv", "Gemm"],
        weight_type=QuantType.QUInt8,
    )


def _without_inner_shapes(path: Path):
    """The model without the shapes between its nodes: quantisation transposes weights."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


def _agreement(small: Runnable, exact: Runnable, size: tuple[int, ...]) -> tuple[float, int]:
    images = torch.randn(INT8_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([exact(x[None]) for x in images])
    found = torch.cat([small(x[None]) for x in images])
    same = (expected.argmax(1) == found.argmax(1)).sum().item()
    return relative_difference(found, expected), same
