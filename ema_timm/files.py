"""Files that are written atomically, their hashes, and locks between processes."""

import contextlib
import errno
import hashlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ema_timm.errors import UserError

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None

WEIGHTS = "model.safetensors"
"""The weights file of every folder that the package writes, and of timm's repositories."""

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp|\.(\d+)\.writable")
"""Names of temporary files, with the id of the process that writes them."""


def cache_folder() -> Path:
    """The folder for what the package remembers: EMA_TIMM_CACHE, else ~/.cache/ema-timm.

    Raises:
        OSError: If neither that variable nor a home folder exists.
    """
    if named := os.environ.get("EMA_TIMM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "ema-timm"
    except RuntimeError as error:
        raise OSError("there is no home folder: set EMA_TIMM_CACHE to a folder") from error


def write_whole(final: Path, write: Callable[[Path], Any], previous: Path | None = None) -> None:
    """Write a file atomically: ``write(temporary_path)``, flush to disk, rename.

    A full disk, a crash or Ctrl-C never leaves half a file under the final name.

    Args:
        final: The name of the file.
        write: Writes a file of the name that it receives.
        previous: New name for the file that was there before; None drops it. If the process is
            killed, the file may exist only under this name.
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
    """Make a folder and its parents, and check that it is writable.

    Raises:
        UserError: If it is not.
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
    """Remove temporary files in ``folder`` whose processes have ended.

    Files with this process's id are removed too: in a container, where ids repeat, an earlier
    process wrote them.
    """
    for file in folder.glob(".*"):
        found = _TEMPORARY.fullmatch(file.name)
        if found and not _is_another_running(int(found[1] or found[2])):
            with contextlib.suppress(OSError):
                file.unlink()


def _is_another_running(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":  # Windows refuses to remove open files
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


_HELD: dict[tuple[int, Path], threading.Lock] = {}
"""The locks of this process's threads, by process and file."""


class Owner(NamedTuple):
    """The process that holds a lock.

    Attributes:
        host: Its machine; empty if it has not written it yet.
        process: Its id.
        alive: The operating system holds the lock for it. Otherwise only the file names it.
    """

    host: str
    process: str
    alive: bool

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.host else "another process"


@contextlib.contextmanager
def lock(file: Path, on_busy: Callable[[Owner], None]) -> Iterator[None]:
    """Hold a lock of the operating system while the block runs; ``file`` names its owner.

    The system releases the lock when its process ends, however it ends. Child processes do not
    inherit it: the lock is one of ``lockf``, not of ``flock``.

    Args:
        file: Created for the lock, and removed afterwards.
        on_busy: Called with another owner. If it returns, `lock` waits for an owner that is alive,
            and takes the place of one that only the file names.

    Raises:
        OSError: If the file cannot be opened or written.
    """
    with _lock_in_process(file, on_busy):
        handle = _take(file, on_busy)
        try:
            yield
        finally:
            if fcntl is None:
                handle.close()  # Windows does not remove open files
            with contextlib.suppress(OSError):
                file.unlink()
            handle.close()


@contextlib.contextmanager
def _lock_in_process(file: Path, on_busy: Callable[[Owner], None]) -> Iterator[None]:
    """Hold ``file`` against other threads.

    To the system they are one process: each would get its lock, and lose it when the other closes
    the file.
    """
    process = os.getpid()  # a forked child holds nothing
    held = _HELD.setdefault((process, file.resolve()), threading.Lock())
    if not held.acquire(blocking=False):
        on_busy(Owner(socket.gethostname(), str(process), alive=True))
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _take(file: Path, on_busy: Callable[[Owner], None]) -> TextIO:
    """The lock file: open, locked, and with this process's name in it."""
    here, job = socket.gethostname(), _job()
    while True:
        with contextlib.ExitStack() as opened:
            handle = opened.enter_context(file.open("a+", encoding="utf-8"))
            locked = _try_lock(handle)
            handle.seek(0)
            host, process, owners_job, *_ = [*handle.read().split(), "", "", ""]
            # With the lock in our hands, the name of this machine is that of a killed process, and
            # so is the name of another machine that this job was moved away from.
            own = host == here or (job and owners_job == job)
            if locked is False or (host and not (locked and own)):
                on_busy(Owner(host, process, alive=locked is False))
            if locked is False:
                fcntl.lockf(handle, fcntl.LOCK_EX)
            if _is_open_file(file, handle):
                handle.truncate(0)
                handle.write(" ".join(filter(None, (here, str(os.getpid()), job))) + "\n")
                handle.flush()
                opened.pop_all()
                return handle


def _job() -> str:
    """The id of this process's job, which it keeps on another machine; empty if there is none."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if (job := os.environ.get(name, "none")) != "none":  # torchrun's default
            return "-".join(job.split())
    return ""


def _try_lock(handle: TextIO) -> bool | None:
    """Whether this process got the lock; None if the system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _is_open_file(file: Path, handle: TextIO) -> bool:
    """Whether ``file`` is still the file that was opened: an owner removes it at its end."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
