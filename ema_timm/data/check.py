"""Checks every image before it is used, and remembers the images that passed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL
from tqdm.auto import tqdm

from ema_timm.data.image_folder import LabelledImages
from ema_timm.data.images import Inspection, unreadable
from ema_timm.errors import UnreadableImageError, some
from ema_timm.files import cache_folder, write_whole

_CHUNK = 64


def check_readable(
    dataset: LabelledImages,
    progress: bool = True,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Open every image, on all cores.

    Args:
        dataset: The images.
        progress: Show a bar (on a terminal).
        decode: Decode the images to their ends instead of reading only their headers. Images that
            passed are not decoded again until one of them changes.
        share: (I, N): check the images I, I + N, I + 2 N ...

    Returns:
        Sentences on images that are not read as an image viewer shows them.

    Raises:
        UnreadableImageError: If there are images that cannot be opened. It names the first ones.
    """
    indices = range(share[0], len(dataset), share[1])
    passed = Remembered("whole", [(dataset, indices)]) if decode else None
    known = passed.load() if passed else None
    if isinstance(known, dict) and known.keys() == set(Inspection._fields):
        found = Inspection(**known)
    else:
        found = _inspect_all(dataset, indices, decode, progress)
        if passed:
            passed.save(found._asdict())
    return _notes(found, dataset.split)


def _inspect_all(
    dataset: LabelledImages, indices: range, decode: bool, progress: bool
) -> Inspection:
    found, faults = Inspection(), []
    bar = tqdm(total=len(indices), desc="checking images", disable=None if progress else True,
               leave=False)  # fmt: skip
    with bar:
        for index, each in _inspections(dataset, indices, decode):
            bar.update()
            if isinstance(each, Exception):
                faults.append((index, each))
            else:
                found = Inspection(*map(sum, zip(found, each, strict=True)))
    if faults:
        raise _all_unreadable(dataset, faults)
    return found


def _inspections(
    dataset: LabelledImages, indices: range, decode: bool
) -> Iterator[tuple[int, Inspection | Exception]]:
    """Each image's index and what was found, in order. Pillow decodes without Python's lock."""

    def inspect(chunk: range) -> list:
        return [dataset.inspect(index, decode) for index in chunk]

    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for chunk, found in zip(chunks, pool.map(inspect, chunks), strict=True):
            yield from zip(chunk, found, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _all_unreadable(
    dataset: LabelledImages, faults: list[tuple[int, Exception]]
) -> UnreadableImageError:
    """One line that names the first ones, so that all can be repaired at once."""
    (first, error), *others = faults
    message = str(unreadable(dataset.file_name(first), error, dataset.remedy))
    if others:
        names = [dataset.file_name(index) for index, _ in others]
        message += f" The same is true of {len(others)} more: {some(names, 20)}"
    return UnreadableImageError(message)


def _notes(found: Inspection, split: str) -> list[str]:
    notes = []
    if found.rotated:
        notes.append(
            f"{split}: {found.rotated} images have an EXIF rotation, which is not applied (timm "
            "and torchvision do not apply it either)."
        )
    if found.sixteen_bit:
        notes.append(
            f"{split}: {found.sixteen_bit} images have 16-bit greyscale. They are scaled to 8 "
            "bits; timm's scripts clip them to white."
        )
    return notes


class Remembered:
    """What was found in images earlier, until one of them changes.

    The file's name is a hash of all that the outcome depends on: Pillow's version, and path, size
    and time of every image. Images in memory have none of these and are not remembered.

    Args:
        kind: What was found; a folder of that name in the cache.
        images: Data sets, and the indices of their images.
    """

    def __init__(self, kind: str, images: Iterable[tuple[LabelledImages, Iterable[int]]]):
        digest, self.file = hashlib.sha256(f"Pillow {PIL.__version__}\n".encode()), None
        for dataset, indices in images:
            for index in indices:
                with contextlib.suppress(FileNotFoundError):  # a broken link; the check names it
                    if not (stamp := dataset.stamp(index)):
                        return
                    digest.update(os.fsencode(f"{stamp}\n"))
            digest.update(b"\n")
        self.file = cache_folder() / kind / f"{digest.hexdigest()}.json"

    def load(self) -> Any:
        """What was found, or None if there is no file."""
        try:
            return json.loads(self.file.read_text()) if self.file else None
        except (OSError, ValueError):
            return None

    def save(self, found: Any) -> None:
        """Write the file. If that fails, the images are looked at again the next time."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, lambda path: path.write_text(json.dumps(found)))
