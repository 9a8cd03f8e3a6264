"""A checkpoint folder -> one verified file in it.

A file gets its final name only after it has been loaded afresh and has agreed with the network on
inputs of several sizes; what of batch, height and width is not given stays free.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import reparameterize_model

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.publishing.export.formats import FORMATS
from ema_timm.publishing.export.layer import ready_to_export
from ema_timm.publishing.export.network import (
    ALL_FREE,
    InputSize,
    check_inputs,
    load,
    require_sizes,
)
from ema_timm.publishing.export.packages import require
from ema_timm.publishing.export.verify import verify


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
    require(*way.packages, *way.exporters.get(exporter, ()))
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
