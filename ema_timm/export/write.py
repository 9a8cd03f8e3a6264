"""A checkpoint folder -> one verified file in it.

A file gets its final name only after it has been loaded afresh and has agreed with the network on
inputs of several sizes; what of batch, height and width is not given stays free.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.errors import VerificationError, first_line, require_packages
from ema_timm.export.formats import FORMATS, Format
from ema_timm.export.inputs import (
    ALL_FREE,
    InputSize,
    check_inputs,
    load,
    require_sizes,
)
from ema_timm.export.layers import ready_to_export
from ema_timm.ops.reference import relative_difference


class Exported(NamedTuple):
    """One verified file.

    Attributes:
        path: Where it is.
        sizes: Inputs it was compared on, (B, C, H, W) each.
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
) -> Exported:
    """Write ``model.onnx``, ``model.torchscript`` or ``model.pt2`` into a checkpoint folder.

    Args:
        folder: A checkpoint in timm's format, such as a run of ``ema-timm finetune``.
        format: A key of `FORMATS`.
        reparam: Fold first what depends on weights alone, timm's ``--reparam``.
        exporter: For ONNX, which of PyTorch's two exporters: "dynamo" or "legacy".
        fixed: Sizes of the input that the file takes alone; the rest stays free.

    Raises:
        UserError: If the folder holds no checkpoint, or a package is missing.
        VerificationError: If the file does not compute what the network computes.
    """
    way = FORMATS[format]
    require_packages([*way.packages, *way.exporters.get(exporter, ())], "export")
    model = load(folder, scriptable=way.scriptable, exportable=way.exportable)
    if reparam:
        model = reparameterize_model(model).eval()
    inputs = check_inputs(model, fixed)
    require_sizes(model, inputs, fixed)
    image = inputs[-1] if fixed.image else None
    ready = ready_to_export(model, image, onnx=way.exportable, pytorch=not way.exportable)
    options = {"exporter": exporter} if way.exporters else {}
    found = []

    def write_and_verify(path: Path) -> None:
        """Write to a temporary name; what is raised here leaves no file."""
        with torch.no_grad(), warnings.catch_warnings():
            # PyTorch's exporters warn about their own future, at every call.
            warnings.simplefilter("ignore")
            way.write(ready, inputs[-1], path, free=fixed.free(), **options)
            found.append(verify(path, way, model, inputs))

    run = CheckpointWriter(folder)
    run.write(way.file, write_and_verify)
    return Exported(run.path / way.file, [tuple(x.shape) for x in inputs], found[0])


# MERGED: A written file, loaded afresh, against the network it was made from.
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest number of the network's output."""


def verify(path: Path, way: Format, model: nn.Module, inputs: list[Tensor]) -> float:
    """Compare the file with the network on every input.

    Returns:
        The largest `relative_difference`.

    Raises:
        VerificationError: If the file does not load, or does not compute what the network does.
    """
    name = way.file
    try:
        run = way.open(path)
        found = [relative_difference(run(x), model(x)) for x in inputs]
    except Exception as error:  # the runtimes' errors have nothing else in common
        raise VerificationError(
            f"{name} was not written: it does not load, or not take another size than it was "
            f"exported with ({first_line(error)}). Give the size of your images with --size, or "
            "another --format."
        ) from error
    if not all(difference <= TOLERANCE for difference in found):  # NaN fails too
        worst = max(found)
        raise VerificationError(
            f"{name} was not written: it differs from the network by {worst:.1e} of its largest "
            f"output, over {TOLERANCE:.0e}. Try another --format or --exporter."
        )
    return max(found)
