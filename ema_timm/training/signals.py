"""Ctrl-C and SIGTERM as a request, so that a run ends between two steps."""

import contextlib
import os
import signal
from collections.abc import Iterator


class Stop:
    """Whether a signal has asked the run to stop."""

    def __init__(self):
        self.requested = False
        self._process = os.getpid()

    def on_signal(self, signum: int, frame) -> None:
        """Note the request; the handler of both signals."""
        if os.getpid() != self._process:
            # A loader process has inherited this handler. Ctrl-C is its parent's affair, which
            # still wants the batches; to be terminated is its own.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.requested:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.requested = True
        if signum == signal.SIGINT:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within this context SIGINT and SIGTERM set `Stop.requested`; a second one interrupts."""
    stop = Stop()
    try:
        before = {s: signal.signal(s, stop.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals go elsewhere
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
