"""Runs of several processes that one interpreter forks: only one of them imports PyTorch."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def in_processes(*commands, seconds=300):
    """Run commands of ema-timm one after another, each in several processes.

    Args:
        commands: For each, ``count`` processes, ``args`` and, if one of them gets a signal, its
            ``rank``, the ``signal``, and ``at``: "TrainStep.__call__" or "Tally.add" with the
            number of the call before which it comes.

    Returns:
        For each command the exit codes by rank, and all that the processes wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(commands, default=str)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads do not survive a fork
    )
    assert done.returncode == 0, done.stderr
    return [(codes, text) for codes, text in map(json.loads, done.stdout.splitlines())]


def _signal_before(rank, name, at, signum):
    from ema_timm.measure.metrics import Tally
    from ema_timm.training.step import TrainStep

    owner, _, function = name.partition(".")
    owner, calls = {"TrainStep": TrainStep, "Tally": Tally}[owner], []
    called = getattr(owner, function)

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signum)
        return called(*args)

    setattr(owner, function, call)


def _fork(rank, count, port, job):
    """The id of a process that runs ``job`` with torchrun's variables."""
    if child := os.fork():
        return child
    code = 99
    with contextlib.suppress(BaseException):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        if count > 1:
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        if job.get("rank") == rank:
            _signal_before(rank, *job["at"], job.get("signal", signal.SIGTERM))
        from ema_timm.cli import main

        try:
            code = main(job["args"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise
    os._exit(code)


def _run(number, job, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job["log"] = str(Path(folder, f"{number}.txt"))
    children = [_fork(rank, job["count"], port, job) for rank in range(job["count"])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([codes, Path(job["log"]).read_text()]), flush=True)


if __name__ == "__main__":
    import tempfile

    import ema_timm.training.run  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(json.loads(sys.argv[1])):
            _run(number, job, folder)
