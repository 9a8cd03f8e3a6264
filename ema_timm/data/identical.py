"""Finds the images that two splits share, by their content."""

import hashlib
from collections.abc import Callable, Sequence

from ema_timm.data.check import Remembered
from ema_timm.data.image_folder import LabelledImages

_START = 4096
"""Bytes that tell most files of the same size apart."""

_KEYS: tuple[Callable[[LabelledImages, int], int | bytes], ...] = (
    lambda images, index: images.size(index),
    lambda images, index: hashlib.sha256(images.content(index, _START)).digest(),
    lambda images, index: hashlib.sha256(images.content(index)).digest(),
)


def identical_images(train: LabelledImages, val: LabelledImages) -> list[int]:
    """Find the validation images that are training images too: the same file, byte for byte.

    Of most files this reads nothing but the size. The result is remembered until a file changes.

    Args:
        train: The training images.
        val: The validation images.

    Returns:
        Indices of ``val``.
    """
    memory = Remembered("identical", [(each, range(len(each))) for each in (train, val)])
    found = memory.load()
    if not isinstance(found, list):
        found = _find(train, val)
        memory.save(found)
    return found


def _find(train: LabelledImages, val: LabelledImages) -> list[int]:
    left: list[Sequence[int]] = [range(len(train)), range(len(val))]
    for key in _KEYS:
        keys = [
            {index: key(images, index) for index in indices}
            for images, indices in zip((train, val), left, strict=True)
        ]
        shared = set(keys[0].values()) & set(keys[1].values()) - {0}  # an empty file, or a FIFO
        left = [[index for index, value in each.items() if value in shared] for each in keys]
    return list(left[1])
