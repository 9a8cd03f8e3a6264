"""Files that are whole or not there at all, and their digests."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ema_timm.errors import UserError

WEIGHTS = "model.safetensors"
"""The weights file of every folder that the package writes, and of timm's repositories."""

_PASSING = re.compile(r"\..+\.(\d+)\.tmp|\.(\d+)\.writable")
"""Names of files that are just being written, with the process that writes them."""


def cache_folder() -> Path:
    """Where the package notes what it found out: EMA_TIMM_CACHE, else ~/.cache/ema-timm.

    Raises:
        OSError: If there is neither that variable nor a home.
    """
    if named := os.environ.get("EMA_TIMM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "ema-timm"
    except RuntimeError as error:
        raise OSError("there is no home folder: set EMA_TIMM_CACHE to one for notes") from error


def write_whole(final: Path, write: Callable[[Path], Any], previous: Path | None = None) -> None:
    """Write a file by ``write(temporary_path)``, flush it to disk, then give it its name.

    A full disk, a crash or Ctrl-C never leaves half a file under the final name.

    Args:
        final: The name.
        write: Writes a file of the name that it is given.
        previous: Name for the file that was there before; None drops it. A process that is
            killed may leave the file under this name alone.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and final.exists():
            final.replace(previous)
        temporary.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def make_writable(folder: Path) -> None:
    """Make a folder, with those above it, and see that it can be written to.

    Raises:
        UserError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. Free or unlock it, or give another "
            "folder."
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone were just writing in ``folder``, under passing names.

    Those of this process's number too: where it is always the same, as in a container, it was
    another process's.
    """
    for file in folder.glob(".*"):
        found = _PASSING.fullmatch(file.name)
        if found and not _lives_elsewhere(int(found[1] or found[2])):
            with contextlib.suppress(OSError):
                file.unlink()


def _lives_elsewhere(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":  # Windows keeps the open files of the living
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
