"""The lock on a run's folder: one run at a time."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ema_timm.errors import UserError
from ema_timm.files import Owner, lock, make_writable
from ema_timm.training.processes import is_main
from ema_timm.training.resume import RunState


@contextlib.contextmanager
def lock_run(saved: RunState, resume: bool) -> Iterator[None]:
    """Hold the folder of ``saved`` for one run while the block runs.

    If the run has several processes, the main one holds the lock for all.

    Args:
        saved: The state in the folder.
        resume: Continue a run; otherwise one starts, and what the folder holds is not overwritten.

    Raises:
        UserError: If the folder holds a run and ``resume`` is off, holds none and ``resume`` is
            on, is in use by another run, or cannot be written. Folders made for the run are
            removed again.
    """
    if not is_main():
        if resume:
            saved.check(resume)
        yield
        return
    made = [f for f in (saved.folder, *saved.folder.parents) if not f.exists()]
    file = saved.folder / "lock"
    try:
        make_writable(saved.folder)
        with lock(file, partial(_refuse, saved.run, file)):
            saved.check(resume)
            saved.remove_leftovers()
            yield
    finally:
        for folder in made:  # empty if the start failed; from the inside out
            with contextlib.suppress(OSError):
                folder.rmdir()


def _refuse(run: Path, file: Path, owner: Owner) -> None:
    """Say which process uses the folder ``run``, and what to do.

    Raises:
        UserError: Always.
    """
    if owner.alive:
        raise UserError(
            f"{run} is in use by {owner}. Wait for that run, stop it, or give another --output."
        )
    raise UserError(
        f"{run} is in use by {owner}, which cannot be checked from here. If that run has ended, "
        f"remove {file} and run the same command again; otherwise give another --output."
    )
