"""Runs in processes of their own, one on each device at a time, and what is told meanwhile."""

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
    """A run under way."""

    run: PlannedRun
    device: str | None
    process: subprocess.Popen
    started: float
    asked: bool = False

    def ask_to_stop(self) -> None:
        """Let it end after the step under way, once: a second request would not wait for that."""
        if not self.asked:
            self.asked = True
            self.process.terminate()


def run_all(
    runs: Sequence[PlannedRun],
    devices: Sequence[str | None],
    finish: Callable[[PlannedRun, str | None], str],
    progress: bool = True,
) -> dict[str, str]:
    """Run what is left, side by side on the devices.

    Args:
        runs: What is left to be trained.
        devices: Where; one named twice runs two at a time, and None is what the settings say.
        finish: Called with each run that has ended well and its device; measures it, and returns
            what is told of it.
        progress: Tell on stderr what is done, what is left and when it will end.

    Returns:
        Why runs failed, by their names.

    Raises:
        InterruptedRunError: After Ctrl-C or SIGTERM. Every run can be continued.
    """
    left, free = deque(runs), deque(devices)
    under_way: list[_Child] = []
    told, failed = _Progress(len(runs), len(devices), progress), {}
    with stop_on_signal() as stop:
        try:
            while under_way or (left and not stop.requested):
                while left and free and not stop.requested:
                    under_way.append(_start(left.popleft(), free.popleft()))
                for child in [c for c in under_way if c.process.poll() is not None]:
                    under_way.remove(child)
                    free.append(child.device)
                    if not stop.requested:
                        why = _end(child, finish, told)
                        failed.update({child.run.name: why} if why else {})
                _wait(under_way, stop)
        finally:
            for child in under_way:  # a second Ctrl-C has come, or an error
                child.process.kill()
                child.process.wait()
    if stop.requested and told.left:
        raise InterruptedRunError(
            f"stopped with {told.left} of {len(runs)} runs to do; the same command goes on"
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
            start_new_session=True,  # Ctrl-C is for this process, which passes it on
        )
    return _Child(run, device, process, time.monotonic())


def _end(child: _Child, finish: Callable, told: "_Progress") -> str:
    """Finish a run that has ended; why it failed, or nothing."""
    code = child.process.returncode
    why = reason(child.run.log, code) if code else ""
    try:
        line = f"failed: {why}" if why else finish(child.run, child.device)
    except UserError as error:
        why = first_line(error)
        line = f"not measured: {why}"
    told.done(child.run, line, time.monotonic() - child.started)
    return why


def _wait(under_way: Sequence[_Child], stop: Stop) -> None:
    if stop.requested:
        for child in under_way:
            child.ask_to_stop()
    if under_way:
        time.sleep(_POLL_SECONDS)


def reason(log: Path, code: int | None = None) -> str:
    """Why a run has ended as it did: the last line of what it told.

    Args:
        log: What it told.
        code: Its exit code, where that is known; below 0 the signal that ended it.
    """
    if code is not None and code < 0:
        return f"ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("ema-timm: ") if lines else f"ended with exit code {code}"


class _Progress:
    """Lines on stderr: what is done, what is left, when it will end."""

    def __init__(self, total: int, side_by_side: int, shown: bool):
        self.total, self.side_by_side, self.shown = total, side_by_side, shown
        self.left, self.seconds = total, 0.0

    def done(self, run: PlannedRun, line: str, seconds: float) -> None:
        """Tell of a run that has ended."""
        self.left -= 1
        self.seconds += seconds
        count = self.total - self.left
        self._tell(
            f"[{count}/{self.total}] {run.name}: {line}, {seconds:.0f} s{self._ahead(count)}"
        )

    def _ahead(self, count: int) -> str:
        if not self.left:
            return ""
        seconds = self.seconds / count * self.left / min(self.side_by_side, self.left)
        end = datetime.now() + timedelta(seconds=seconds)
        return f"; {self.left} left, about {_duration(seconds)}, until {end:%a %H:%M}"

    def _tell(self, line: str) -> None:
        if self.shown:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
