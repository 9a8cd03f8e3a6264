"""The notes of one environment in the hands of one process at a time.

States of a candidate at a layer: nothing noted -> TRYING -> SOUND -> ACCEPTED or REJECTED with a
reason. TRYING is on the disk before the candidate first runs: no ``except`` sees a kill, or what
comes after a GPU's fault. Whoever holds the lock and finds TRYING knows that its writer is gone.
"""

import contextlib
import errno
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ema_timm.files import write_whole
from ema_timm.ops.gpu.choices import Layer, Notes, file_of, read_file

try:
    import fcntl
except ImportError:  # not Unix: of two processes at once the last one's notes stay
    fcntl = None

_logger = logging.getLogger(__name__)

TRYING, SOUND, ACCEPTED, REJECTED = "trying", "sound", "accepted", "rejected"
_ENDED = "a process ended while it tried it at {layer}; --retry (retry=True) forgets that"


class Store:
    """Notes of one environment, read when they are taken hold of and written at each step.

    Args:
        environment: Whose, as `ema_timm.ops.gpu.choices.environment` has it.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.notes = Notes()
        self.file: Path | None = None
        """Where the notes are; None where there is no place for them."""
        self.kept = True
        """Whether they can be written."""

    @contextlib.contextmanager
    def hold(self, retry: bool = False, layers: Iterable[Layer] = ()) -> Iterator[None]:
        """Keep other processes waiting while the block runs, and begin from what they noted.

        Args:
            retry: Drop what is noted of ``layers``, and which candidates are barred.
            layers: See ``retry``.
        """
        with contextlib.ExitStack() as held:
            try:
                self.file = file_of(self.environment)
                self.file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_lock(self.file.with_suffix(".lock")))
            except OSError as error:
                self._forgo(error)
            if self.file:
                self.notes = read_file(self.file, self.environment)
            self._settle()
            if retry:
                self._forget(layers)
            for name, reason in self.notes.barred.items():
                _logger.warning("%s is not tried: %s.", name, reason)
            yield

    def known(self, layer: Layer, names: Iterable[str]) -> bool:
        """Whether nothing is left to measure at ``layer``, of the candidates ``names``."""
        found = self.notes.layers.get(layer, {})
        states = {found.get(name, {}).get("state") for name in names}
        chosen = layer in self.notes.chosen
        return states <= {ACCEPTED, REJECTED} and chosen == (ACCEPTED in states)

    def note(self, layer: Layer, name: str, state: str, **found: Any) -> None:
        """Note the state of a candidate, on the disk before this returns."""
        entries = self.notes.layers.setdefault(layer, {})
        entries[name] = {**entries.get(name, {}), "state": state, **found}
        self._write()

    @contextlib.contextmanager
    def trying(self, layer: Layer, name: str, marked: bool = True) -> Iterator[None]:
        """Note TRYING before the first run of a candidate, unless it is not to be ``marked``.

        An end that Python sees, such as Ctrl-C, leaves no mark.
        """
        if marked:
            self.note(layer, name, TRYING)
        try:
            yield
        finally:
            if self.notes.layers.get(layer, {}).get(name, {}).get("state") == TRYING:
                del self.notes.layers[layer][name]
                self._write()

    def bar(self, layer: Layer, name: str, reason: str) -> None:
        """Note that nobody shall try a candidate again, at any layer."""
        self.notes.barred[name] = reason
        self.note(layer, name, REJECTED, reason=reason)

    def choose(self, layer: Layer, name: str | None) -> None:
        """Note who computes ``layer``."""
        if name is not None:
            self.notes.chosen[layer] = name
        self._write()

    def _forget(self, layers: Iterable[Layer]) -> None:
        self.notes.barred.clear()
        for layer in layers:
            self.notes.layers.pop(layer, None)
            self.notes.chosen.pop(layer, None)

    def _settle(self) -> None:
        """Bar what was being tried when its process ended."""
        for layer, entries in self.notes.layers.items():
            for name, entry in entries.items():
                if entry["state"] == TRYING:
                    self.bar(layer, name, _ENDED.format(layer=layer))

    def _write(self) -> None:
        if not self.kept or self.file is None:
            return
        content = {
            "environment": self.environment,
            "barred": self.notes.barred,
            "layers": [
                {
                    "layer": layer._asdict(),
                    "chosen": self.notes.chosen.get(layer),
                    "candidates": entries,
                }
                for layer, entries in self.notes.layers.items()
            ],
        }
        text = json.dumps(content, indent=1) + "\n"
        try:
            write_whole(self.file, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            self._forgo(error)

    def _forgo(self, error: OSError) -> None:
        self.kept = False
        _logger.warning(
            "The choices cannot be written (%s): they hold for this process alone. Set "
            "EMA_TIMM_CACHE to a folder that can be written to.",
            error,
        )


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with its process, however that ends."""
    with file.open("a", encoding="utf-8") as handle:
        _take(handle)
        yield  # closing the file lets go


def _take(handle: TextIO) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _logger.warning("%s cannot be locked (%s): choose in one process.", handle.name, error)
            return
        _logger.warning("Another process is choosing for this GPU: waiting for it.")
        fcntl.lockf(handle, fcntl.LOCK_EX)
