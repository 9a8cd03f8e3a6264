"""Ctrl-C and SIGTERM as requests to stop, so that a run ends between two steps."""

import contextlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORKER_SECONDS = 60
"""How long a data loader worker lives on after SIGTERM. torchrun kills everything after 30 s."""


class Stop:
    """Whether a signal requested the run to stop.

    Attributes:
        signum: The number of the signal; 0 without one.
    """

    def __init__(self):
        self.signum = 0
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signum != 0

    def on_signal(self, signum: int, frame) -> None:
        """Record the request. This is the handler of both signals."""
        if os.getpid() != self._process:  # a child process inherited this handler
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.requested:
            # A second Ctrl-C stops at once. Schedulers repeat SIGTERM, which changes nothing.
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = int(signum)
        if signum == signal.SIGINT:
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within this context SIGINT and SIGTERM set `Stop.signum`; a second SIGINT interrupts."""
    stop = Stop()
    try:
        before = {s: signal.signal(s, stop.on_signal) for s in _SIGNALS}
    except ValueError:  # only the main thread can handle signals
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_workers(loader: DataLoader) -> Generator:
    """Iterate over a loader whose workers serve the run also after the signals. Close it.

    torchrun and some schedulers send SIGTERM to every process of a group. The run still needs
    batches then, until all its processes have agreed on the step to stop at.
    """
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):  # the latter on Windows
        yield from loader
        return
    given, before = loader.worker_init_fn, signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:  # workers inherit the blocked signals, until `_keep_serving` runs in them
        loader.worker_init_fn = partial(_keep_serving, given)
        batches = iter(loader)
    finally:
        loader.worker_init_fn = given
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from batches
    finally:
        # An error keeps the iterator alive. Python would then end the workers by SIGTERM when it
        # exits, and wait until they obey.
        batches._shutdown_workers()


def _keep_serving(before: Callable[[int], None] | None, worker: int) -> None:
    """The ``worker_init_fn`` of `start_workers`; ``before`` is the loader's own."""
    if before is not None:
        before(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
