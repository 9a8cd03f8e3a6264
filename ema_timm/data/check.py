"""Images looked at before they are used: each is opened, or decoded whole."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import PIL
from tqdm.auto import tqdm

from ema_timm.data.images import Seen, unreadable
from ema_timm.data.splits import Dataset
from ema_timm.errors import UnreadableImageError
from ema_timm.files import cache_folder, write_whole

_CHUNK = 64


def check_readable(
    dataset: Dataset,
    progress: bool = True,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Open every image, on all cores.

    Args:
        dataset: The images.
        progress: Show a bar (on a terminal).
        decode: Read them to their ends, not their headers alone. What was whole once, and has
            not been changed since, is not read again.
        share: Look at images I, I + N, I + 2 N ... of (I, N).

    Returns:
        Sentences on what is not read as a picture viewer would.

    Raises:
        UnreadableImageError: If there are images that cannot be opened. It names the first ones.
    """
    indices = range(share[0], len(dataset), share[1])
    known = _Known(dataset, indices) if decode else None
    found = known.load() if known else None
    if found is None:
        found = _look_at_all(dataset, indices, decode, progress)
        if known:
            known.save(found)
    return _notes(found, dataset)


def _look_at_all(dataset: Dataset, indices: range, decode: bool, progress: bool) -> Seen:
    rotated = deep = 0
    faults = []
    bar = tqdm(total=len(indices), desc="checking images", disable=None if progress else True,
               leave=False)  # fmt: skip
    with bar:
        for index, seen in _looks(dataset, indices, decode):
            bar.update()
            if isinstance(seen, Exception):
                faults.append((index, seen))
            else:
                rotated, deep = rotated + seen.rotated, deep + seen.deep
    if faults:
        raise _all_unreadable(dataset, faults)
    return Seen(rotated, deep)


def _looks(
    dataset: Dataset, indices: range, decode: bool
) -> Iterator[tuple[int, Seen | Exception]]:
    """Each image's number and what was seen, in order. Pillow decodes without Python's lock."""

    def look_at(chunk: range) -> list:
        return [dataset.look(index, decode) for index in chunk]

    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for chunk, seen in zip(chunks, pool.map(look_at, chunks), strict=True):
            yield from zip(chunk, seen, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _all_unreadable(dataset: Dataset, faults: list[tuple[int, Exception]]) -> UnreadableImageError:
    """One line that names the first ones, so that all can be repaired at once."""
    (first, error), *others = faults
    said = str(unreadable(dataset.file_name(first), error, dataset.remedy))
    if others:
        names = ", ".join(dataset.file_name(index) for index, _ in others[:20])
        more = " ..." if len(others) > 20 else ""
        said += f" The same goes for {len(others)} more: {names}{more}"
    return UnreadableImageError(said)


def _notes(seen: Seen, dataset: Dataset) -> list[str]:
    notes = []
    if seen.rotated:
        notes.append(
            f"{dataset.split}: {seen.rotated} images carry a camera's note to turn them (EXIF). "
            "They are read as they are stored, as timm reads them."
        )
    if seen.deep:
        notes.append(
            f"{dataset.split}: {seen.deep} images have 16-bit grey. They are scaled to 8 bits; "
            "timm's scripts cut them off, to white."
        )
    return notes


class _Known:
    """What is known of images since an earlier look.

    The file's name is a digest of all that the outcome depends on: Pillow's version, and place,
    size and time of every image.
    """

    def __init__(self, dataset: Dataset, indices: range):
        digest = hashlib.sha256(f"Pillow {PIL.__version__}\n".encode())
        for index in indices:
            with contextlib.suppress(FileNotFoundError):  # a broken link; the look says so
                digest.update(f"{dataset.stamp(index)}\n".encode())
        self.file = cache_folder() / "whole" / f"{digest.hexdigest()}.json"

    def load(self) -> Seen | None:
        """What was seen, if it is noted."""
        try:
            return Seen(**json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, seen: Seen) -> None:
        """Note it; where that cannot be, the images are read again the next time."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, lambda path: path.write_text(json.dumps(seen._asdict())))
