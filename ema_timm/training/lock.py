"""A run's folder in the hands of one run at a time: refused, or made, locked and let go."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ema_timm.errors import UserError
from ema_timm.files import make_writable
from ema_timm.training.processes import is_main
from ema_timm.training.resume import RunState

try:
    import fcntl
except ImportError:  # not Unix: a lock that was left behind is removed by hand
    fcntl = None


@contextlib.contextmanager
def claim(saved: RunState, resume: bool) -> Iterator[None]:
    """Hold the folder of ``saved`` for one run while the block runs.

    Of several processes the main one holds it, for all.

    Args:
        saved: The state in the folder.
        resume: Continue a run; otherwise one starts, and what the folder holds is not overwritten.

    Raises:
        UserError: If the folder holds a run and ``resume`` is off, holds none and ``resume`` is
            on, is another run's just now, or cannot be written. Nothing is left of it then that
            was not there.
    """
    if not is_main():
        if resume:
            saved.check(resume)
        yield
        return
    made = [f for f in (saved.folder, *saved.folder.parents) if not f.exists()]
    try:
        make_writable(saved.folder)
        with _lock(saved.folder / "lock", saved.run):
            saved.check(resume)
            saved.remove_leftovers()
            yield
    finally:
        for folder in made:  # those of a start that failed are empty, from the inside out
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _lock(file: Path, run: Path) -> Iterator[None]:
    """Hold a lock of the operating system on ``file``, which tells whose it is.

    Such a lock ends with its process, however that ends, and loader processes do not inherit it.
    """
    handle = _take(file, run)
    try:
        yield
    finally:
        if fcntl is None:
            handle.close()  # Windows removes no open file
        with contextlib.suppress(OSError):
            file.unlink()
        handle.close()


def _take(file: Path, run: Path) -> TextIO:
    """The lock file, open, locked and with this process's name in it."""
    here = socket.gethostname()
    while True:
        handle = file.open("a+", encoding="utf-8")
        locked = _try_lock(handle)
        handle.seek(0)
        host, _, process = handle.read().strip().partition(" ")
        # One that we could lock and that names this machine was left behind by a killed run.
        if locked is False or (host and not (locked and host == here)):
            handle.close()
            raise UserError(_in_use(file, run, host, process, told=locked is False))
        if _is(file, handle):
            handle.truncate(0)
            handle.write(f"{here} {os.getpid()}\n")
            handle.flush()
            return handle
        handle.close()


def _try_lock(handle: TextIO) -> bool | None:
    """Whether the lock is ours now; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _is(file: Path, handle: TextIO) -> bool:
    """Whether ``file`` is still what was opened: its last owner removes it when it ends."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False


def _in_use(file: Path, run: Path, host: str, process: str, told: bool) -> str:
    """What is said of a folder that is another run's.

    Args:
        file: Its lock.
        run: The folder.
        host: Where that run is; empty where it is just about to write it.
        process: The number of its process.
        told: The system has said that it lives; else the file alone says so.
    """
    owner = f"process {process} on {host}" if host else "another process"
    if told:
        return f"{run} is in use by {owner}. Wait for that run, stop it, or give another --output."
    return (
        f"{run} is in use by {owner}, which cannot be asked from here. If that run is gone, remove "
        f"{file} and run the same command again; else give another --output."
    )
