"""Trains runs in processes, one on each device at a time, and reports their progress."""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ema_timm.checkpoints.layout import RESULTS
from ema_timm.compare.runs import PlannedRun, process_arguments
from ema_timm.errors import InterruptedRunError, UserError, one_line
from ema_timm.training.signals import Stop, stop_on_signal

_POLL_SECONDS = 0.1


@dataclass
class _Child:
    """A run that is training."""

    run: PlannedRun
    device: str | None
    process: subprocess.Popen
    started: float
    epochs: int  # reported, or done before
    last_epoch: float  # when the last of them was reported
    results_changed: int = 0
    stopping: bool = False

    def stop(self) -> None:
        """Let it end after the current step. A second signal would end it at once, so send one."""
        if not self.stopping:
            self.stopping = True
            self.process.terminate()

    def new_epochs(self) -> list[dict]:
        """The epochs that ended since the last call."""
        file = self.run.folder / RESULTS
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        if changed == self.results_changed:
            return []
        self.results_changed = changed
        new = [entry for entry in self.run.history() if entry["epoch"] > self.epochs]
        self.epochs += len(new)
        return new


def run_all(
    runs: Sequence[PlannedRun],
    devices: Sequence[str | None],
    finish: Callable[[PlannedRun, str | None], str],
    progress: bool = True,
) -> dict[str, str]:
    """Train runs in parallel on the devices.

    Args:
        runs: The runs to train.
        devices: The devices. A device named twice trains two runs at a time; None is the device
            of the settings.
        finish: Called with each run that ended successfully and its device. It evaluates the run
            and returns a message about it.
        progress: Report finished and remaining runs and the expected end on stderr.

    Returns:
        Why runs failed, by their names.

    Raises:
        InterruptedRunError: After Ctrl-C or SIGTERM. Every run can be continued.
    """
    left, free = deque(runs), deque(devices)
    training: list[_Child] = []
    report, failed = _Progress(runs, len(devices), progress), {}
    with stop_on_signal() as stop:
        try:
            while training or (left and not stop.requested):
                while left and free and not stop.requested:
                    training.append(_start(left.popleft(), free.popleft()))
                for child in training:
                    report.epochs(child)
                for child in [c for c in training if c.process.poll() is not None]:
                    training.remove(child)
                    free.append(child.device)
                    if not stop.requested:
                        why = _end(child, finish, report)
                        failed.update({child.run.name: why} if why else {})
                _wait(training, stop)
        finally:
            for child in training:  # after a second Ctrl-C, or an error
                child.process.kill()
                child.process.wait()
    if stop.requested and report.left:
        raise InterruptedRunError(
            f"stopped with {report.left} of {len(runs)} runs to do; the same command continues",
            stop.signum,
        )
    return failed


def _start(run: PlannedRun, device: str | None) -> _Child:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            process_arguments(run.arguments(device)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which stops them
        )
    now = time.monotonic()
    return _Child(run, device, process, now, len(run.history()), now)


def _end(child: _Child, finish: Callable, report: "_Progress") -> str:
    """Finish a run whose process has ended; returns why it failed, or an empty text."""
    code = child.process.returncode
    why = failure_reason(child.run.log, code) if code else ""
    try:
        line = f"failed: {why}" if why else finish(child.run, child.device)
    except UserError as error:
        why = one_line(error)
        line = f"not evaluated: {why}"
    report.done(child.run, line, time.monotonic() - child.started)
    return why


def _wait(training: Sequence[_Child], stop: Stop) -> None:
    if stop.requested:
        for child in training:
            child.stop()
    if training:
        time.sleep(_POLL_SECONDS)


def failure_reason(log: Path, code: int | None = None) -> str:
    """Why a run failed: the error at the end of its output.

    Args:
        log: The file with its output.
        code: Its exit code, if known. A negative code is the signal that ended it.
    """
    if code is not None and code < 0:
        return f"ended by signal {-code}"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, own, error = f"\n{text}".rpartition("\nema-timm: ")
    if own and "\nTraceback " not in error:
        return " ".join(error.split())  # an error may have several lines
    if text:
        return text.splitlines()[-1]
    return "interrupted" if code is None else f"ended with exit code {code}"


class _Progress:
    """Lines on stderr: each epoch, each run that ended, and the expected end.

    Args:
        runs: The runs to train.
        parallel: How many of them train at a time.
        shown: Print at all.
    """

    def __init__(self, runs: Sequence[PlannedRun], parallel: int, shown: bool):
        self.total, self.parallel, self.shown = len(runs), parallel, shown
        self.left = len(runs)
        self._epochs_left = {run.name: run.epochs - len(run.history()) for run in runs}
        self._epochs_timed, self._seconds = 0, 0.0

    def epochs(self, child: _Child) -> None:
        """Report the epochs that a run has finished since the last call."""
        run = child.run
        for entry in child.new_epochs():
            now = time.monotonic()
            self._epochs_left[run.name] -= 1
            self._epochs_timed += 1
            self._seconds += now - child.last_epoch
            child.last_epoch = now
            self._print(
                f"{run.name}: epoch {entry['epoch']}/{run.epochs}, top-1 "
                f"{entry['top1']:.2f}% of {entry['images']} validation images{self._rest()}"
            )

    def done(self, run: PlannedRun, line: str, seconds: float) -> None:
        """Report a run that has ended."""
        self.left -= 1
        self._epochs_left[run.name] = 0
        count = self.total - self.left
        rest = f"; {self.left} runs left" if self.left else ""
        self._print(
            f"[{count}/{self.total}] {run.name}: {line}, {_duration(seconds)}{rest}{self._rest()}"
        )

    def _rest(self) -> str:
        """The expected end, from the mean time of an epoch. A run with patience may end earlier."""
        left = sum(self._epochs_left.values())
        if not left or not self._epochs_timed:
            return ""
        parallel = min(self.parallel, self.left)
        seconds = self._seconds / self._epochs_timed * left / parallel
        end = datetime.now() + timedelta(seconds=seconds)
        return f"; about {_duration(seconds)} left, until {end:%a %H:%M}"

    def _print(self, line: str) -> None:
        if self.shown:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
