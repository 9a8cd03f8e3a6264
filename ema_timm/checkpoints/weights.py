"""Checks of weights before use: the file is what it claims, and its tensors are the network's."""

import os
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ema_timm.checkpoints.state import is_counter
from ema_timm.errors import UserError, sentence, some

LONGEST_HEADER = 4 * 2**20
"""Bytes of a safetensors header: enough for some 40,000 tensors."""

PICKLES = (".bin", ".pth", ".pt", ".pth.tar", ".ckpt")
"""Suffixes of weights that are pickles."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ARCHIVE = b"PK\x03\x04"
_UNREADABLE = (OSError, zipfile.BadZipFile, NotImplementedError, ValueError)


class _Claim(NamedTuple):
    """What says which network a file's weights are of.

    Attributes:
        network: The network, as errors name it.
        remedy: What to do if the weights are of another one.
    """

    network: str
    remedy: str


_FOLDER = _Claim(
    "the network that config.json names",
    "Put the config.json and the weights of one checkpoint together.",
)


def check_file(file: Path, expected: dict[str, Tensor]) -> None:
    """Read a safetensors file through, tensor by tensor, and check it against a network's.

    Args:
        file: The weights.
        expected: State dict of the network; its shapes and types count, so it may be on "meta".

    Raises:
        UserError: If the file is missing, damaged, not finite or of another network.
    """
    if not file.is_file():
        raise UserError(_missing(file))
    check_bounds(file)
    try:
        with safe_open(file, framework="pt") as weights:
            _check_names(file, set(weights.keys()), expected, _FOLDER)
            for name in weights.keys():
                _check_tensor(file, name, weights.get_tensor(name), expected[name], _FOLDER)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is damaged: {sentence(error)} Copy the file again from where it was whole, or "
            "write the folder again."
        ) from error


def _missing(file: Path) -> str:
    """The error for a folder without safetensors: timm's save_for_hf writes a pickle by default."""
    pickles = sorted(f.name for f in file.parent.glob("*model*") if f.name.endswith(PICKLES))
    if not pickles:
        return f"{file} is missing. Give a folder that ema-timm or timm wrote."
    return (
        f"{file} is missing: the folder holds a pickle, {pickles[0]}. Save the network again with "
        f"timm.models.save_for_hf(model, {str(file.parent)!r}, safe_serialization=True), or write "
        f"a folder of that file with ema-timm evaluate {file.parent / pickles[0]} --model NAME "
        "--data-dir DIR --output FOLDER."
    )


def load_checked(network: nn.Module, state: dict[str, Tensor], file: Path, name: str) -> None:
    """Load weights, which must be complete, finite and of this network.

    Args:
        network: Takes the weights.
        state: The weights.
        file: Where they came from, for errors.
        name: timm's name of the network, for errors.

    Raises:
        UserError: If they are not.
    """
    expected = network.state_dict()
    claim = _Claim(name, "Give the --model of these weights, and its --model-kwargs.")
    _check_names(file, set(state), expected, claim)
    for key, tensor in state.items():
        _check_tensor(file, key, tensor, expected[key], claim)
    network.load_state_dict(state)


def check_bounds(file: Path) -> None:
    """Check the sizes that a checkpoint file declares, before anything in it is unpacked.

    Args:
        file: A safetensors file by its name, else an archive or a pickle by its first bytes.

    Raises:
        UserError: If they are larger than the file, or it cannot be read, such as an archive that
            is cut short.
    """
    try:
        size = os.path.getsize(file)
        with file.open("rb") as content:
            start = content.read(8)
        if file.suffix == ".safetensors":
            _check_header(file, start, size)
        elif start.startswith(_ARCHIVE):
            _check_records(file, size)
    except _UNREADABLE as error:
        raise UserError(
            f"{file} cannot be read: {sentence(error)} Copy it again, or take another checkpoint."
        ) from error


def _check_header(file: Path, start: bytes, size: int) -> None:
    """Refuse a long header. safetensors itself names a header that is longer than the file."""
    claimed = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if LONGEST_HEADER < claimed <= size:
        raise UserError(
            f"{file} is refused: it has a header of {claimed:,} bytes, and that of a network has "
            f"at most {LONGEST_HEADER:,}. Take a file with the weights of one network."
        )


def _check_records(file: Path, size: int) -> None:
    """Refuse an archive whose records are larger than itself: torch.save does not compress."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > size:
        raise UserError(
            f"{file} is refused: its records unpack to {unpacked:,} bytes, more than the file has, "
            "but torch.save does not compress. Save it again with torch.save."
        )


def _check_names(file: Path, found: set[str], expected: dict[str, Tensor], claim: _Claim) -> None:
    """Refuse weights whose names are not those of the network. Counters of batches may lack."""
    missing = sorted(name for name in expected.keys() - found if not is_counter(name))
    unknown = sorted(found - expected.keys())
    if missing or unknown:
        faults = [f"lacks {some(missing, 3)}"] if missing else []
        faults += [f"has {some(unknown, 3)}"] if unknown else []
        raise UserError(
            f"{file} is not of {claim.network}: it {' and '.join(faults)}. {claim.remedy}"
        )


def _check_tensor(file: Path, name: str, tensor: Tensor, expected: Tensor, claim: _Claim) -> None:
    """Refuse a tensor of another shape or type than the network's, or that is not finite."""
    if tensor.shape != expected.shape:
        raise UserError(
            f"{file}: {name} is {tuple(tensor.shape)}, but {claim.network} takes "
            f"{tuple(expected.shape)}. {claim.remedy}"
        )
    floating = expected.is_floating_point()
    if tensor.dtype not in (_FLOATS if floating else (expected.dtype,)):
        raise UserError(
            f"{file}: {name} is {tensor.dtype}, and the network takes {expected.dtype}. The "
            "header is wrong, or the file was converted wrongly. Write the folder again."
        )
    if floating and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"{file}: {name} holds {bad} NaN or infinite values. Train again with a smaller "
            "learning rate, or take an earlier checkpoint."
        )
