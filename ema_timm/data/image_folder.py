"""The images of an image folder, identified by a fingerprint; an unreadable one is an error."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch.utils.data import Dataset

from ema_timm.data.folders import TRAIN, Listing, find_split, list_images
from ema_timm.data.images import REMEDY, Inspection, inspect_image, mode_of, read_image
from ema_timm.errors import UserError, some
from ema_timm.names import encodable


class LabelledImages(Dataset, ABC):
    """Images with a class each, in a fixed order. An image that cannot be read is an error.

    timm's own data sets load the next image instead, with a warning. A metric would then be of
    other images than it says.

    Args:
        name: Name of the data.
        split: Name of the split.
        place: What an error calls them.
        class_to_idx: Index of each class by its name.
        targets: Index of each image's class.
        paths: The image files; None if the images are not files.
        notes: Sentences on what was skipped.

    Attributes:
        transform: Applied to every image; timm's ``create_loader`` sets it.
        remedy: What the error for an unreadable image says to do.
    """

    def __init__(
        self,
        name: str,
        split: str,
        place: str,
        class_to_idx: dict[str, int],
        targets: list[int],
        paths: list[str] | None,
        notes: Sequence[str] = (),
    ):
        self.name, self.split, self.place, self.notes = name, split, place, list(notes)
        self.class_to_idx, self.targets, self.paths = class_to_idx, targets, paths
        self.transform: Callable[[Image], Any] | None = None
        self.remedy, self.mode = REMEDY, "RGB"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        name = self.file_name(index)
        image = read_image(self.source(index), self.mode, name, self.remedy)
        return self.transform(image), self.targets[index]

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the images and their classes; looks at every file."""

    def source(self, index: int) -> str | BytesIO | Image:
        """An image as `read_image` takes it."""
        return self.paths[index]

    def file_name(self, index: int) -> str:
        """What an error calls an image."""
        return self.paths[index] if self.paths else f"image {index} of {self.name}, {self.split}"

    def size(self, index: int) -> int:
        """Bytes of an image file, or of the pixels of an image in memory."""
        return os.path.getsize(self.paths[index]) if self.paths else len(self.content(index))

    def content(self, index: int, most: int | None = None) -> bytes:
        """An image file, or the pixels of an image in memory; the first ``most`` bytes of it."""
        source = self.source(index)
        if isinstance(source, Image):
            return source.tobytes()[:most]
        with source if isinstance(source, BytesIO) else open(source, "rb") as file:
            return file.read(most)

    def stamp(self, index: int) -> str:
        """Text that changes when an image file is changed or replaced; empty if that is unknown."""
        found = os.stat(self.paths[index])
        return f"{os.path.abspath(self.paths[index])}\t{found.st_size}\t{found.st_mtime_ns}"

    def inspect(self, index: int, decode: bool) -> Inspection | Exception:
        """See `ema_timm.data.images.inspect_image`."""
        return inspect_image(self.source(index), decode)

    def read_channels(self, channels: int) -> None:
        """Read greyscale images for a network of one input channel, RGB for one of three.

        Raises:
            UserError: For any other number.
        """
        self.mode = mode_of(channels)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def class_counts(self) -> list[int]:
        """Images of each class, in the order of their indices."""
        counts = Counter(self.targets)
        return [counts[self.class_to_idx[name]] for name in self.class_names]


class FolderDataset(LabelledImages):
    """The images of one split of an image folder.

    Args:
        listing: The files.
        class_to_idx: Index of each class.
    """

    def __init__(self, listing: Listing, class_to_idx: dict[str, int]):
        paths = [path for path, _ in listing.images]
        targets = [class_to_idx[name] for _, name in listing.images]
        where = (listing.name, listing.split, str(listing.root))
        super().__init__(*where, class_to_idx, targets, paths, listing.notes)

    def fingerprint(self) -> str:
        """Sha256 over the relative path and size in bytes of every image, in order."""
        digest = hashlib.sha256()
        for path in self.paths:
            relative = Path(path).relative_to(self.place).as_posix()
            digest.update(os.fsencode(f"{relative}\t{os.path.getsize(path)}\n"))
        return digest.hexdigest()


def open_folder(
    data_dir: str | Path, names: tuple[str, ...], class_map: dict | None = None
) -> FolderDataset:
    """One split of an image folder.

    Args:
        data_dir: Folder with one folder a split, each with one folder a class.
        names: Names of the split's folder; the first that exists is used.
        class_map: Class name to index; None numbers the folders in natural order.

    Raises:
        UserError: If the folder or its images are missing, it has a class that is not in
            ``class_map``, or the class of an image is not clear.
    """
    root = find_split(data_dir, names)
    if root is None:
        raise UserError(
            f"{data_dir} has no folder {' or '.join(names)}/. An image folder looks like "
            "DIR/train/CLASS/image.jpg and DIR/val/CLASS/image.jpg; one without these two takes "
            "--val-split 0.2."
        )
    return _dataset(list_images(root), class_map)


def split_folder(
    data_dir: str | Path, part: float, class_map: dict | None = None
) -> tuple[FolderDataset, FolderDataset]:
    """Split the images of a folder that has no split into training and validation images.

    Of each class ``part`` is set aside, at least one image and never all. The sha256 of an image's
    name decides: every run and every seed gets the same images, a smaller part is within a larger
    one, and an image that is added later hardly moves the others.

    Args:
        data_dir: Folder with one folder a class, or with those in ``train/``.
        part: Between 0 and 1.
        class_map: Class name to index; None numbers the folders in natural order.

    Raises:
        UserError: As `open_folder`, or if a class has only one image.
    """
    flat = find_split(data_dir, TRAIN) is None
    whole = list_images(Path(data_dir) if flat else find_split(data_dir, TRAIN))
    name = encodable(whole.root.resolve().name) if flat else whole.name
    by_class = {name: [] for name in whole.classes}
    for path, of_class in whole.images:
        by_class[of_class].append(path)
    aside = {path for paths in by_class.values() for path in _set_aside(paths, whole.root, part)}
    trained = [pair for pair in whole.images if pair[0] not in aside]
    held = [pair for pair in whole.images if pair[0] in aside]
    class_map = number(str(whole.root), whole.classes, class_map)
    return (
        _dataset(Listing(whole.root, name, "train", trained, whole.notes), class_map),
        _dataset(Listing(whole.root, name, f"{part:g} set aside", held), class_map),
    )


def fraction(text: str) -> float | None:
    """The number in ``--val-split``, or None if it is empty.

    Raises:
        UserError: If it is not a number between 0 and 1.
    """
    if not text:
        return None
    try:
        part = float(text)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise UserError(
            f"--val-split must be a fraction between 0 and 1, such as 0.2, got {text}. To choose a "
            "split by its name, use --split."
        )
    return part


def _set_aside(paths: list[str], root: Path, part: float) -> list[str]:
    if len(paths) < 2:
        raise UserError(
            f"{paths[0]} is the only image of its class, but --val-split needs one to train on "
            "and one to validate on. Add images, or remove the class."
        )

    def drawn(path: str) -> bytes:
        return hashlib.sha256(os.fsencode(Path(path).relative_to(root).as_posix())).digest()

    count = min(max(round(part * len(paths)), 1), len(paths) - 1)
    return sorted(paths, key=drawn)[:count]


def _dataset(listing: Listing, class_map: dict | None) -> FolderDataset:
    return FolderDataset(listing, number(str(listing.root), listing.classes, class_map))


def number(place: str, classes: list[str], class_map: dict | None) -> dict[str, int]:
    """Indices of classes: those of ``class_map``, else in the order of their names.

    Raises:
        UserError: If ``class_map`` lacks one.
    """
    if class_map is None:
        return {name: index for index, name in enumerate(classes)}
    unknown = [name for name in classes if name not in class_map]
    if unknown:
        raise UserError(
            f"{place} has classes that are not among those trained on ({some([*class_map], 5)}): "
            f"{some(sorted(unknown), 5)}. Rename or remove their folders."
        )
    return class_map
