"""Image folders: checked before training, read by timm's loader, identified by a fingerprint."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from timm.data import ImageDataset
from tqdm import tqdm

from ema_timm.errors import UnreadableImageError, UserError

TRAIN = ("train",)
VAL = ("val", "validation")


class FolderDataset(ImageDataset):
    """timm's image folder, except that an unreadable image is an error.

    timm replaces such an image by the next one with a warning, which changes what an accuracy is
    an accuracy of.
    """

    def __getitem__(self, index: int):
        path, target = self.reader.samples[index]
        try:
            with Image.open(path) as image:
                image = image.convert(self.input_img_mode)
        except OSError as error:
            raise UnreadableImageError(_unreadable(path, error)) from error
        return self.transform(image), target

    def read_channels(self, channels: int) -> None:
        """Read greyscale images for a network of one input channel, RGB for one of three.

        Raises:
            UserError: For any other number.
        """
        if channels not in (1, 3):
            raise UserError(
                f"image files have 1 or 3 channels, and the network takes {channels}. Use "
                "--model-kwargs in_chans=1 or 3."
            )
        self.input_img_mode = "L" if channels == 1 else "RGB"

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Index of each class by its folder's name."""
        return self.reader.class_to_idx

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def fingerprint(self) -> str:
        """Sha256 over the relative path and size in bytes of every image, in order."""
        digest = hashlib.sha256()
        for path, _ in self.reader.samples:
            relative = Path(path).relative_to(self.reader.root).as_posix()
            digest.update(f"{relative}\t{os.path.getsize(path)}\n".encode())
        return digest.hexdigest()


def open_folder(
    data_dir: str | Path, names: tuple[str, ...], class_map: dict | None = None
) -> FolderDataset:
    """One split of an image folder.

    Args:
        data_dir: Folder with one folder a split, each with one folder a class.
        names: Names of the split's folder, the first that exists is taken.
        class_map: Class name to index; None numbers the folders in natural order.

    Raises:
        UserError: If the folder or its images are missing, or hold a class not in ``class_map``.
    """
    root = next((Path(data_dir) / n for n in names if (Path(data_dir) / n).is_dir()), None)
    if root is None:
        raise UserError(
            f"{data_dir} has no folder {' or '.join(names)}/. An image folder looks like "
            "DIR/train/CLASS/image.jpg and DIR/val/CLASS/image.jpg."
        )
    try:
        dataset = FolderDataset(root)
        if class_map is not None:
            unknown = sorted(set(dataset.class_to_idx) - set(class_map))
            if unknown:
                raise UserError(
                    f"{root} has classes that the training images lack: {', '.join(unknown[:5])}. "
                    "Both splits take the same class folders."
                )
            dataset = FolderDataset(root, class_map=class_map)
    except RuntimeError as error:
        raise UserError(
            f"{root} has no images in class folders. Put them at {root}/CLASS/image.jpg."
        ) from error
    return dataset


def check_readable(dataset: FolderDataset, progress: bool = True) -> None:
    """Open every image's header.

    Raises:
        UnreadableImageError: For the first image, in order, that cannot be opened.
    """
    paths = [path for path, _ in dataset.reader.samples]
    with ThreadPoolExecutor(8) as pool:
        opened = pool.map(_header_error, paths, chunksize=64)
        hide = None if progress else True
        bar = tqdm(opened, "checking images", len(paths), disable=hide, leave=False)
        for path, error in zip(paths, bar, strict=True):
            if error is not None:
                raise UnreadableImageError(_unreadable(path, error))


def _header_error(path: str) -> OSError | None:
    try:
        with Image.open(path):
            return None
    except OSError as error:
        return error


def _unreadable(path: str, error: OSError) -> str:
    reason = "not an image" if "cannot identify" in str(error) else str(error)
    return f"cannot read {path}: {reason}. Repair or remove it."
