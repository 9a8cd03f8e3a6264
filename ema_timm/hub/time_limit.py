"""A time limit for steps on the network.

The client of the Hub has none: it waits for a server that never answers, or that asks to wait for
an hour. A timer of the operating system interrupts it. The timer needs the main thread and Unix;
elsewhere the limit is only checked between two steps.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class TimeUpError(Exception):
    """A step has used up its time."""


class _Alarm(BaseException):
    """Not an Exception, because the client's retry loops would catch one."""


class TimeLimit:
    """The time limit of a command, from now on."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; 0 when they are used up."""
        return max(0.0, self._end - time.monotonic())

    @contextlib.contextmanager
    def step(self, seconds: float | None = None) -> Iterator[None]:
        """Run the block within ``seconds`` and within what is left of the whole.

        Raises:
            TimeUpError: When the time is used up, also in a blocking call.
        """
        allowed = self.left if seconds is None else min(seconds, self.left)
        if not allowed:
            raise TimeUpError
        try:
            with _alarm(allowed):
                yield
        except _Alarm:
            raise TimeUpError from None


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(signum, frame):
        """End whatever runs."""
        raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    # Again after a second, in case a callback catches the first alarm.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
