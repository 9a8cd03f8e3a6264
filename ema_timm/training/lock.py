"""The lock on a run's folder: one run at a time, in all its processes the same one."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ema_timm.errors import UserError
from ema_timm.files import Owner, lock, make_writable
from ema_timm.training.processes import Process
from ema_timm.training.resume import RunState


@contextlib.contextmanager
def open_run(saved: RunState, resume: bool, process: Process) -> Iterator[dict | None]:
    """Hold the folder of ``saved`` for one run, and yield the state that the run resumes from.

    If the run has several processes, the main one holds the lock and reads the state for all. So
    only its machine needs the folder.

    Args:
        saved: The state in the folder.
        resume: Continue the run in the folder, if there is one; otherwise one starts, and what
            the folder holds is not overwritten.
        process: This process.

    Yields:
        The state, or None for a new run.

    Raises:
        UserError: As `lock_run`, or if the state is damaged. Also if another process finds a run
            where the main one does not: a restart may move the main process to another machine.
    """
    with contextlib.ExitStack() as held:
        state = None
        with process.fail_together():
            if process.main:
                held.enter_context(lock_run(saved, resume))
                state = saved.load() if resume and saved.exists() else None
        saved.forget()
        finds = process.gather(saved.exists())
        if not finds[0] and any(finds):
            with process.fail_together():
                raise UserError(
                    f"{saved.run} holds a run on the machine of process {finds.index(True)}, and "
                    "none on that of process 0. --output must be a folder that all machines share."
                )
        if saved.warning:
            print(saved.warning, file=sys.stderr)
        yield process.broadcast(state)


@contextlib.contextmanager
def lock_run(saved: RunState, resume: bool) -> Iterator[None]:
    """Hold the folder of ``saved`` for one run while the block runs.

    Args:
        saved: The state in the folder.
        resume: Continue a run or start one; otherwise one starts.

    Raises:
        UserError: If the folder holds a run and ``resume`` is off, holds a checkpoint without a
            state, is in use by another run, or cannot be written. Folders made for the run are
            removed again.
    """
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
