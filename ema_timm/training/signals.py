"""Ctrl-C and SIGTERM as requests to stop, so that a run ends between two steps."""

import contextlib
import os
import signal
from collections.abc import Iterator


class Stop:
    """Whether a signal requested the run to stop."""

    def __init__(self):
        self.requested = False
        self._process = os.getpid()

    def on_signal(self, signum: int, frame) -> None:
        """Record the request. This is the handler of both signals."""
        if os.getpid() != self._process:
            # A data loader worker inherited this handler. It ignores Ctrl-C, because its parent
            # still needs the batches, but it obeys SIGTERM.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.requested:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        self.requested = True
        if signum == signal.SIGINT:
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within this context SIGINT and SIGTERM set `Stop.requested`; a second one interrupts."""
    stop = Stop()
    try:
        before = {s: signal.signal(s, stop.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread can handle signals
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
