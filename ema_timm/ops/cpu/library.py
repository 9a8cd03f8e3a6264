"""The kernel's library: what it was built from, whether it loads, what it can.

Standard library only: the build (``setup.py``) runs this file for `digest`, before PyTorch is
there. It leaves `NOTE` beside the library: the digest of the sources, which an installed package
does not have, and why the compiler failed, where it did.
"""

import ctypes
import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path

_logger = logging.getLogger(__name__)

NAME = "_kernel.so"
"""The library's file, whatever Python is installed."""

NOTE = "_kernel.json"
"""What the build leaves beside the library: ``abi``, and ``failure``, one line or null."""

FLOAT16 = 1
"""The bit of ``ema_features()`` that says that the compiler had a type for float16."""

_COMPILERS = "GCC, or clang with its OpenMP (libomp)"
_HERE = Path(__file__).parent


def digest(folder: Path) -> int:
    """64 bits that change with any C source or header in ``folder``: the kernel's ABI number."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return int.from_bytes(found.digest()[:8], "big")


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is none; the reason is in the log and in `status`."""
    found, reason = _find()
    if found is None:
        _logger.warning("EMA attention runs on PyTorch operators on the CPU: %s.", reason)
    return found


@cache
def has_float16() -> bool:
    """Whether the library can read and write float16."""
    found = library()
    return found is not None and bool(found.ema_features() & FLOAT16)


def status() -> str:
    """One line on the CPU kernel, for people: in use, or why not."""
    found, reason = _find()
    if found is None:
        return reason
    return "native kernel" + ("" if has_float16() else " (float16 in PyTorch: no _Float16 in C)")


@cache
def _find() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("EMA_TIMM_NATIVE", "1") == "0":
        return None, "the native kernel is switched off by EMA_TIMM_NATIVE=0"
    abi, failure = _built()
    if failure:
        return None, f"the native kernel could not be built ({failure}); it needs {_COMPILERS}"
    if not (_HERE / NAME).exists():
        return None, f"the native kernel was not built (it needs {_COMPILERS})"
    try:
        found = _open(_HERE / NAME)
        found.ema_abi.restype = ctypes.c_uint64
        same = found.ema_abi() == abi
    except (OSError, AttributeError) as error:
        return None, f"the native kernel did not load ({error})"
    if not same:
        return None, f"the native kernel was built from other sources: {_remedy()}"
    found.ema_sums_size.restype = ctypes.c_int64
    found.ema_sums_size.argtypes = [ctypes.c_int64]
    return found, ""


def _open(path: Path) -> ctypes.CDLL:
    """The library, with the OpenMP that PyTorch has loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # A PyTorch that keeps its OpenMP to itself: the same library again, or the system's.
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            raise error from None
        return ctypes.CDLL(str(path))


def _built() -> tuple[int | None, str | None]:
    """The ABI number that a library must have, and why the last build of it failed, if it did."""
    try:
        note = json.loads((_HERE / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        note = {}
    if (_HERE / "csrc").is_dir():  # a checkout: the sources count, whatever was built last
        abi = digest(_HERE / "csrc")
        return abi, note.get("failure") if note.get("abi") == abi else None
    return note.get("abi"), note.get("failure")


def _remedy() -> str:
    if (_HERE / "csrc").is_dir():
        return "pip install -e . --no-deps rebuilds it"
    return "pip install --force-reinstall --no-deps ema-timm"
