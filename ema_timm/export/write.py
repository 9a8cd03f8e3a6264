"""From a checkpoint folder to one verified file in it.

The file gets its final name only after it has been opened again and has agreed with the network on
inputs of several sizes. Batch, height and width stay free unless they are given.
"""

import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.network import open_network
from ema_timm.errors import VerificationError, one_line, require_packages
from ema_timm.export.description import describe
from ema_timm.export.formats import FORMATS, Format
from ema_timm.export.inputs import ALL_FREE, InputSize, check_inputs, one_image, require_sizes
from ema_timm.export.layers import ready_to_export
from ema_timm.ops.reference import relative_difference

EXPORT_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest magnitude of the network's output."""

FP16_TOLERANCE = 3e-2
"""The same for weights in half precision, which are off by 1e-3; a deep network amplifies that."""


class Exported(NamedTuple):
    """One verified file.

    Attributes:
        path: The file.
        sizes: Inputs on which it was compared, (B, C, H, W) each.
        difference: Largest difference from the network, relative to its largest output.
    """

    path: Path
    sizes: list[tuple[int, ...]]
    difference: float


def export(
    folder: str | Path,
    format: str,
    reparam: bool = False,
    exporter: str = "dynamo",
    fixed: InputSize = ALL_FREE,
    fp16: bool = False,
) -> Exported:
    """Write a file of another runtime, such as ``model.onnx``, into a checkpoint folder.

    Args:
        folder: A checkpoint in timm's format, such as the output of ``ema-timm finetune``.
        format: A key of `FORMATS`.
        reparam: Call timm's ``reparameterize_model`` first, for other layers that fold weights.
            EMA layers are always folded.
        exporter: For ONNX, which of PyTorch's exporters: "dynamo" or "legacy".
        fixed: The sizes of the input that the file is limited to. ncnn files are limited to one
            image, of the network's own size by default.
        fp16: For ncnn, store the weights in half precision.

    Raises:
        UserError: If the folder holds no checkpoint, or a package is missing.
        VerificationError: If the file does not compute what the network computes.
    """
    kind = FORMATS[format]
    require_packages([*kind.packages, *kind.exporters.get(exporter, ())], kind.extra)
    ways = {"scriptable": kind.scriptable, "exportable": kind.exportable}
    model, model_args = open_network(f"local-dir:{folder}", **ways)
    model = (reparameterize_model(model) if reparam else model).eval()
    if kind.one_image:
        fixed = one_image(model, fixed)
    inputs = check_inputs(model, fixed)
    require_sizes(model, inputs, fixed)
    options = {"exporter": exporter} if kind.exporters else {"fp16": fp16} if kind.fp16 else {}
    run = CheckpointWriter(folder)
    with (
        tempfile.TemporaryDirectory(prefix=".export-", dir=run.path) as scratch,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # PyTorch's exporters warn about their own future
        path = Path(scratch) / kind.file
        ready = ready_to_export(model, kind.dialect, _image(kind, inputs[-1], fixed))
        kind.write(ready, inputs[-1], path, free=fixed.free(), **options)
        if kind.describe:
            kind.describe(path, describe(model, model_args, fixed.image))
        found = verify(path, kind, model, inputs, FP16_TOLERANCE if fp16 else EXPORT_TOLERANCE)
        _move(path, kind, run)
    return Exported(run.path / kind.file, [tuple(x.shape) for x in inputs], found)


def _image(kind: Format, image: Tensor, fixed: InputSize) -> Tensor | None:
    """The example for `ready_to_export`, if the size of images is fixed in the format."""
    # pnnx 20260526 converts pooling by matrix products into what ncnn cannot run.
    return image if fixed.image and not kind.one_image else None


def _move(path: Path, kind: Format, run: CheckpointWriter) -> None:
    """Move a verified file, with the files beside it, into the folder."""
    if kind.beside:  # if the process is killed, never leave files that do not belong together
        (run.path / kind.file).unlink(missing_ok=True)
    for name in (*kind.beside, kind.file):
        run.write(name, path.with_name(name).replace)


def verify(
    path: Path,
    kind: Format,
    model: nn.Module,
    inputs: list[Tensor],
    tolerance: float = EXPORT_TOLERANCE,
) -> float:
    """Open the file, and compare it with the network on every input.

    Returns:
        The largest `relative_difference`.

    Raises:
        VerificationError: If the file cannot be opened, or does not compute what the network does.
    """
    try:
        run = kind.open(path)
        found = [relative_difference(run(x), model(x)) for x in inputs]
    except Exception as error:  # the runtimes' errors have nothing else in common
        raise VerificationError(
            f"{kind.file} was not written: it cannot be opened, or supports only the size that it "
            f"was exported with ({one_line(error)}). Give the size of your images with "
            "--img-size, or another --format."
        ) from error
    if not all(difference <= tolerance for difference in found):  # NaN fails too
        remedy = "Leave out --fp16, or try" if tolerance == FP16_TOLERANCE else "Try"
        raise VerificationError(
            f"{kind.file} was not written: it differs from the network by {max(found):.1e} of its "
            f"largest output, more than {tolerance:.0e}. {remedy} another --format or "
            "--exporter."
        )
    return max(found)
