"""From a checkpoint folder to one verified file in it.

The file gets its final name only after it has been opened again and has agreed with the network on
inputs of several sizes. Batch, height and width stay free unless they are given.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.network import open_network
from ema_timm.errors import VerificationError, one_line, require_packages
from ema_timm.export.formats import FORMATS, Format
from ema_timm.export.inputs import ALL_FREE, InputSize, check_inputs, require_sizes
from ema_timm.export.layers import ready_to_export
from ema_timm.ops.reference import relative_difference

EXPORT_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest magnitude of the network's output."""


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
) -> Exported:
    """Write ``model.onnx``, ``model.torchscript`` or ``model.pt2`` into a checkpoint folder.

    Args:
        folder: A checkpoint in timm's format, such as the output of ``ema-timm finetune``.
        format: A key of `FORMATS`.
        reparam: Call timm's ``reparameterize_model`` first, for other layers that fold weights.
            EMA layers are always folded.
        exporter: For ONNX, which of PyTorch's exporters: "dynamo" or "legacy".
        fixed: The sizes of the input that the file is limited to.

    Raises:
        UserError: If the folder holds no checkpoint, or a package is missing.
        VerificationError: If the file does not compute what the network computes.
    """
    kind = FORMATS[format]
    require_packages([*kind.packages, *kind.exporters.get(exporter, ())], "export")
    ways = {"scriptable": kind.scriptable, "exportable": kind.exportable}
    model = open_network(f"local-dir:{folder}", **ways)[0].eval()
    if reparam:
        model = reparameterize_model(model).eval()
    inputs = check_inputs(model, fixed)
    require_sizes(model, inputs, fixed)
    ready = ready_to_export(model, kind.dialect, inputs[-1] if fixed.image else None)
    options = {"exporter": exporter} if kind.exporters else {}
    found = []

    def write_and_verify(path: Path) -> None:
        """Write to a temporary name; an exception leaves no file."""
        with torch.no_grad(), warnings.catch_warnings():
            # PyTorch's exporters warn about their own future, at every call.
            warnings.simplefilter("ignore")
            kind.write(ready, inputs[-1], path, free=fixed.free(), **options)
            found.append(verify(path, kind, model, inputs))

    run = CheckpointWriter(folder)
    run.write(kind.file, write_and_verify)
    return Exported(run.path / kind.file, [tuple(x.shape) for x in inputs], found[0])


def verify(path: Path, kind: Format, model: nn.Module, inputs: list[Tensor]) -> float:
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
    if not all(difference <= EXPORT_TOLERANCE for difference in found):  # NaN fails too
        raise VerificationError(
            f"{kind.file} was not written: it differs from the network by {max(found):.1e} of its "
            f"largest output, more than {EXPORT_TOLERANCE:.0e}. Try another --format or --exporter."
        )
    return max(found)
