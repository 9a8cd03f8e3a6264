"""Trains runs in processes, one on each device at a time, and reports their progress."""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ema_timm.compare.runs import PlannedRun, process_arguments
from ema_timm.errors import InterruptedRunError, UserError, first_line
from ema_timm.training.signals import Stop, stop_on_signal

_POLL_SECONDS = 0.1


@dataclass
class _Child:
    """A run that is training."""

    run: PlannedRun
    device: str | None
    process: subprocess.Popen
    started: float
    stopping: bool = False

    def stop(self) -> None:
        """Let it end after the current step. A second signal would end it at once, so send one."""
        if not self.stopping:
            self.stopping = True
            self.process.terminate()


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
    report, failed = _Progress(len(runs), len(devices), progress), {}
    with stop_on_signal() as stop:
        try:
            while training or (left and not stop.requested):
                while left and free and not stop.requested:
                    training.append(_start(left.popleft(), free.popleft()))
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
    return _Child(run, device, process, time.monotonic())


def _end(child: _Child, finish: Callable, report: "_Progress") -> str:
    """Finish a run whose process has ended; returns why it failed, or an empty text."""
    code = child.process.returncode
    why = failure_reason(child.run.log, code) if code else ""
    try:
        line = f"failed: {why}" if why else finish(child.run, child.device)
    except UserError as error:
        why = first_line(error)
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
    """Why a run failed: the last line of its output.

    Args:
        log: The file with its output.
        code: Its exit code, if known. A negative code is the signal that ended it.
    """
    if code is not None and code < 0:
        return f"ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("ema-timm: ") if lines else f"ended with exit code {code}"


class _Progress:
    """Lines on stderr: finished and remaining runs, and the expected end."""

    def __init__(self, total: int, parallel: int, shown: bool):
        self.total, self.parallel, self.shown = total, parallel, shown
        self.left, self.seconds = total, 0.0

    def done(self, run: PlannedRun, line: str, seconds: float) -> None:
        """Report a run that has ended."""
        self.left -= 1
        self.seconds += seconds
        if self.shown:
            count = self.total - self.left
            line = f"[{count}/{self.total}] {run.name}: {line}, {seconds:.0f} s{self._rest(count)}"
            print(line, file=sys.stderr, flush=True)

    def _rest(self, count: int) -> str:
        if not self.left:
            return ""
        seconds = self.seconds / count * self.left / min(self.parallel, self.left)
        end = datetime.now() + timedelta(seconds=seconds)
        return f"; {self.left} left, about {_duration(seconds)}, until {end:%a %H:%M}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
