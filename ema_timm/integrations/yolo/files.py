"""Detectors as files: a checkpoint that ultralytics loads, and the model YAML beside it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ema_timm.errors import UserError, VerificationError, sentence
from ema_timm.files import make_writable, write_whole
from ema_timm.integrations.yolo.detector import require_ultralytics, trace_rows
from ema_timm.integrations.yolo.injection import (
    INJECTION_TOLERANCE,
    Injection,
    injected,
    largest_difference,
)
from ema_timm.integrations.yolo.rows import yaml_text

SUFFIXES = (".pt", ".yaml")

# A checkpoint in float16 rounds the weights of the detector, unless they were float16 before.
_HALF_TOLERANCE = 2e-2


def open_detector(source: str | Path) -> Any:
    """A ``YOLO`` or ``RTDETR`` object from a checkpoint or a model YAML.

    Raises:
        UserError: If ultralytics is missing or too old, or the file is not there.
    """
    require_ultralytics()
    if Path(source).suffix not in SUFFIXES:
        raise UserError(f"{source} must be a checkpoint .pt or a model .yaml.")
    from ultralytics import RTDETR, YOLO

    try:
        return (RTDETR if "rtdetr" in Path(source).stem.lower() else YOLO)(str(source))
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"there is no {source}, and ultralytics cannot download it now: {sentence(error)} "
            "Correct the name, or download the file."
        ) from error


def inject_file(
    source: str | Path,
    output: str | Path,
    after: str | list[int] | None,
    groups: int,
    inside: list[str] | None = None,
) -> tuple[Injection, list[Path]]:
    """Write the files of a detector with EMA attention.

    Args:
        source: A checkpoint, whose outputs stay the same, or a model YAML, which gets the paper's
            layer.
        output: ``.pt``, for which the YAML is written as well, or ``.yaml``.
        after: As in `ema_timm.integrations.yolo.injection`.
        groups: The same.
        inside: The same.

    Returns:
        The injection, and the files.

    Raises:
        UserError: If a path has another suffix, is the source, or is a ``.pt`` for a YAML, which
            has no weights.
        VerificationError: If the checkpoint, loaded again, gives other outputs.
    """
    source, output = Path(source), Path(output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output must end in .pt or .yaml, got {output}.")
    if output.suffix == ".pt" and source.suffix != ".pt":
        raise UserError(f"{source} has no weights, so --output must be a .yaml, got {output}.")
    description = output.with_suffix(".yaml")
    for path in {output, description}:
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"--output {output} is the file {source}. Give another name.")
    yolo = open_detector(source)
    done = injected(yolo, after, groups, source.suffix == ".pt", inside)
    make_writable(output.parent)
    written = []
    if output.suffix == ".pt":
        write_checkpoint(yolo, output)
        written.append(output)
    write_whole(description, lambda path: path.write_text(yaml_text(yolo.model.yaml), "utf-8"))
    return done, [*written, description]


def write_checkpoint(yolo: Any, path: Path) -> None:
    """Save as ultralytics saves, in half precision, and check the outputs of the file."""
    write_whole(path, yolo.save)
    loaded = type(yolo)(str(path)).model
    maps = trace_rows(yolo.model)[0]
    difference = largest_difference(maps, trace_rows(loaded)[0])
    if not difference <= (INJECTION_TOLERANCE if is_rounded(yolo.model) else _HALF_TOLERANCE):
        path.unlink()
        raise VerificationError(
            f"{path}, loaded again, gives maps that differ by {difference:.1e}, and was removed."
        )


def is_rounded(net: nn.Module) -> bool:
    """Whether float16 holds every number, as after loading a checkpoint of ultralytics."""
    floats = [t for t in net.state_dict().values() if t.dtype == torch.float32]
    return all(torch.equal(t, t.half().float()) for t in floats)
