"""The images of an image folder, identified by a fingerprint; an unreadable one is an error."""

import hashlib
import os
from collections import Counter
from pathlib import Path

from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from ema_timm.data.folders import TRAIN, Listing, find_split, list_images
from ema_timm.data.images import Seen, look, read_image
from ema_timm.errors import UserError


class FolderReader(Reader):
    """The files of a split and the numbers of their classes, as timm's reader has them.

    Args:
        listing: The files.
        class_to_idx: Index of each class.
    """

    def __init__(self, listing: Listing, class_to_idx: dict[str, int]):
        super().__init__()
        self.root, self.class_to_idx = str(listing.root), class_to_idx
        self.samples = [(path, class_to_idx[name]) for path, name in listing.images]

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return open(path, "rb"), target

    def __len__(self):
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


class FolderDataset(ImageDataset):
    """timm's image folder, except that an unreadable image is an error.

    timm replaces such an image by the next one with a warning, which changes what an accuracy is
    an accuracy of.

    Args:
        listing: The files.
        class_to_idx: Index of each class.
    """

    def __init__(self, listing: Listing, class_to_idx: dict[str, int]):
        super().__init__(listing.root, reader=FolderReader(listing, class_to_idx))
        self.name, self.split, self.notes = listing.name, listing.split, listing.notes
        self.place = str(listing.root)
        self.remedy = "Repair or remove it."

    def __getitem__(self, index: int):
        path, target = self.reader.samples[index]
        return self.transform(read_image(path, self.input_img_mode, path, self.remedy)), target

    def read_channels(self, channels: int) -> None:
        """Read greyscale images for a network of one input channel, RGB for one of three.

        Raises:
            UserError: For any other number.
        """
        self.input_img_mode = mode_of(channels)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Index of each class by its folder's name."""
        return self.reader.class_to_idx

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def class_counts(self) -> list[int]:
        """Images of each class, in the order of their indices."""
        counts = Counter(target for _, target in self.reader.samples)
        return [counts[self.class_to_idx[name]] for name in self.class_names]

    def file_name(self, index: int) -> str:
        """What to call an image in an error."""
        return self.reader.samples[index][0]

    def look(self, index: int, decode: bool) -> Seen | Exception:
        """See `ema_timm.data.images.look`."""
        return look(self.reader.samples[index][0], decode)

    def stamp(self, index: int) -> str:
        """What changes when somebody changes the file."""
        path = self.reader.samples[index][0]
        found = os.stat(path)
        return f"{os.path.abspath(path)}\t{found.st_size}\t{found.st_mtime_ns}"

    def fingerprint(self) -> str:
        """Sha256 over the relative path and size in bytes of every image, in order."""
        digest = hashlib.sha256()
        for path, _ in self.reader.samples:
            relative = Path(path).relative_to(self.reader.root).as_posix()
            digest.update(f"{relative}\t{os.path.getsize(path)}\n".encode())
        return digest.hexdigest()


def mode_of(channels: int) -> str:
    """Pillow's mode for a network of so many input channels; UserError if images have no such."""
    if channels not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, and the network takes {channels}. Use "
            "--model-kwargs in_chans=1 or 3."
        )
    return "L" if channels == 1 else "RGB"


def open_folder(
    data_dir: str | Path, names: tuple[str, ...], class_map: dict | None = None
) -> FolderDataset:
    """One split of an image folder.

    Args:
        data_dir: Folder with one folder a split, each with one folder a class.
        names: Names of the split's folder, the first that exists is taken.
        class_map: Class name to index; None numbers the folders in natural order.

    Raises:
        UserError: If the folder or its images are missing, or hold a class not in ``class_map``,
            or if what they hold can be understood in two ways.
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
    """Images to train on and to validate on, of a folder that does not divide them.

    Of each class ``part`` is set aside, at least one image and never all. Which ones is decided
    by the sha256 of their names alone: every run and every seed gets the same, a smaller part is
    within a larger one, and an image added later hardly moves the others.

    Args:
        data_dir: Folder with one folder a class, or with those in ``train/``.
        part: Between 0 and 1.
        class_map: Class name to index; None numbers the folders in natural order.

    Raises:
        UserError: As `open_folder`, or if a class has one image alone.
    """
    flat = find_split(data_dir, TRAIN) is None
    whole = list_images(Path(data_dir) if flat else find_split(data_dir, TRAIN))
    name = whole.root.resolve().name if flat else whole.name
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
            f"{paths[0]} is the only image of its class, and --val-split needs one to train on "
            "and one to validate on. Add images, or take the class out."
        )

    def drawn(path: str) -> bytes:
        return hashlib.sha256(Path(path).relative_to(root).as_posix().encode()).digest()

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
            f"{place} has classes that the training images lack: "
            f"{', '.join(sorted(unknown)[:5])}. Both splits take the same classes."
        )
    return class_map
