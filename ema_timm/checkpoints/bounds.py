"""What a checkpoint file claims to hold, against what it is: asked before anything is unpacked.

A small file can claim to be a large one: a safetensors file by a header of a million names, an
archive of PyTorch by packed records. Reading either would take minutes, or all the memory.
"""

import os
import struct
import zipfile
from pathlib import Path

from ema_timm.errors import UserError, first_line

LONGEST_HEADER = 4 * 2**20
"""Bytes of a safetensors header: enough for some 40,000 tensors."""

_ARCHIVE = b"PK\x03\x04"
_UNREADABLE = (OSError, zipfile.BadZipFile, NotImplementedError, ValueError)


def check_bounds(file: Path) -> None:
    """Refuse a checkpoint file that claims more than it holds.

    Args:
        file: A safetensors file by its name, else an archive or a pickle by its first bytes.

    Raises:
        UserError: If it does, or cannot be read, such as an archive that is cut short.
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
            f"{file} cannot be read: {first_line(error).rstrip('.')}. Copy it again, or take "
            "another checkpoint."
        ) from error


def _check_header(file: Path, start: bytes, size: int) -> None:
    """Refuse a long header; one that is longer than the file is left to safetensors to name."""
    claimed = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if LONGEST_HEADER < claimed <= size:
        raise UserError(
            f"{file} is refused: it has a header of {claimed:,} bytes, and that of a network has "
            f"at most {LONGEST_HEADER:,}. Take a file with the weights of one network."
        )


def _check_records(file: Path, size: int) -> None:
    """Refuse an archive whose records are larger than itself: torch.save packs none."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > size:
        raise UserError(
            f"{file} is refused: its records unpack to {unpacked:,} bytes, more than the file has, "
            "and those of torch.save are not packed. Save it again with torch.save."
        )
