"""The records of one `tuning_key`, held by one process at a time.

States of a candidate at a layer: no record -> TRYING -> CORRECT -> ACCEPTED or REJECTED with a
reason. A kernel that crashes kills its process, and no ``except`` sees that. So TRYING is on the
disk before a candidate first runs. A process that holds the lock and finds TRYING knows that the
process that wrote it has crashed.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ema_timm.files import Owner, lock
from ema_timm.ops.gpu.choice_file import Layer, Records, file_of, read_file, write_file

_logger = logging.getLogger(__name__)

TRYING, CORRECT, ACCEPTED, REJECTED = "trying", "correct", "accepted", "rejected"
_CRASHED = "a process ended while it tried it at {layer}; --retry (retry=True) clears that"


class Store:
    """The records of one key: read when `hold` begins, written at each step.

    Args:
        key: What `ema_timm.ops.gpu.choice_file.tuning_key` returns.
    """

    def __init__(self, key: dict[str, str]):
        self.key = key
        self.records = Records()
        self.file: Path | None = None
        """The file of the records; None if there is no place for it."""
        self.writable = True
        """Whether the file can be written."""

    @contextlib.contextmanager
    def hold(self, retry: bool = False, layers: Iterable[Layer] = ()) -> Iterator[None]:
        """Keep other processes waiting while the block runs, and start from the file.

        Args:
            retry: Clear the records of ``layers``, and enable all disabled candidates.
            layers: See ``retry``.
        """
        with contextlib.ExitStack() as held:
            try:
                self.file = file_of(self.key)
                self.file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(self.file.with_suffix(".lock"), _on_busy))
            except OSError as error:
                self._stop_writing(error)
            if self.file:
                self.records = read_file(self.file, self.key)
            self._disable_crashed()
            if retry:
                self._clear(layers)
            for name, reason in self.records.disabled.items():
                _logger.warning("%s is not tried: %s.", name, reason)
            yield

    def is_complete(self, layer: Layer, names: Iterable[str]) -> bool:
        """Whether all candidates ``names`` have been measured at ``layer``."""
        found = self.records.layers.get(layer, {})
        states = {found.get(name, {}).get("state") for name in names}
        chosen = layer in self.records.chosen
        return states <= {ACCEPTED, REJECTED} and chosen == (ACCEPTED in states)

    def record(self, layer: Layer, name: str, state: str, **found: Any) -> None:
        """Record the state of a candidate, on the disk before this returns."""
        entries = self.records.layers.setdefault(layer, {})
        entries[name] = {**entries.get(name, {}), "state": state, **found}
        self._write()

    @contextlib.contextmanager
    def trying(self, layer: Layer, name: str, marked: bool = True) -> Iterator[None]:
        """Record TRYING before the first run of a candidate, if ``marked``.

        An exception, such as that of Ctrl-C, removes the record.
        """
        if marked:
            self.record(layer, name, TRYING)
        try:
            yield
        finally:
            if self.records.layers.get(layer, {}).get(name, {}).get("state") == TRYING:
                del self.records.layers[layer][name]
                self._write()

    def disable(self, layer: Layer, name: str, reason: str) -> None:
        """Record that a candidate must never be tried again, at any layer."""
        self.records.disabled[name] = reason
        self.record(layer, name, REJECTED, reason=reason)

    def choose(self, layer: Layer, name: str | None) -> None:
        """Record the choice for ``layer``; None if no candidate can run."""
        if name is not None:
            self.records.chosen[layer] = name
        self._write()

    def _clear(self, layers: Iterable[Layer]) -> None:
        self.records.disabled.clear()
        for layer in layers:
            self.records.layers.pop(layer, None)
            self.records.chosen.pop(layer, None)

    def _disable_crashed(self) -> None:
        """Disable each candidate that was being tried when its process ended."""
        for layer, entries in self.records.layers.items():
            for name, entry in entries.items():
                if entry["state"] == TRYING:
                    self.disable(layer, name, _CRASHED.format(layer=layer))

    def _write(self) -> None:
        if not self.writable or self.file is None:
            return
        try:
            write_file(self.file, self.key, self.records)
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self.writable = False
        _logger.warning(
            "The choices cannot be written (%s): they hold only for this process. Set "
            "EMA_TIMM_CACHE to a writable folder.",
            error,
        )


def _on_busy(owner: Owner) -> None:
    """Warn before `files.lock` waits, or continues without being able to ask the owner."""
    if owner.alive:
        _logger.warning("Another process is choosing for this GPU: waiting for it.")
    else:
        _logger.warning(
            "%s may be choosing for this GPU too, which cannot be checked from here. Tune in one "
            "process at a time.",
            owner,
        )
