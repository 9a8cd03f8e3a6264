"""Image files, in timm's order, prepared as a network takes them; what cannot be read is known."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader, create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import Dataset

from ema_timm.errors import UnreadableImageError, UserError, first_line

# What Pillow's decoders raise on damaged files, and on files too large to be images; ImportError,
# where ultralytics has put a function in the place of Image.open that asks for one more reader.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, ImportError,
)  # fmt: skip


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files that are meant: files as given, of folders every image below, in natural order.

    Raises:
        UserError: If there is no such file, or a folder has no images.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = [Path(file) for file, _ in find_images_and_targets(str(path))[0]]
            if not inside:
                raise UserError(f"there are no images in {path}. Give a folder that has some.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no image or folder {path}. Correct the name.")
    return found


def read_image(path: Path, channels: int) -> Image.Image:
    """An image in the number of channels that a network takes.

    Raises:
        UnreadableImageError: If it cannot be decoded.
        UserError: If the network takes neither 1 nor 3 channels.
    """
    if channels not in (1, 3):
        raise UserError(f"image files have 1 or 3 channels, and the network takes {channels}.")
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except _UNREADABLE as error:
        raise UnreadableImageError(f"{path} cannot be read: {first_line(error)}") from error


class ImageFiles(Dataset):
    """Files for timm's loader, each with its index; -1 - index stands for one it cannot read.

    Args:
        files: The files.
        channels: 1 or 3.
    """

    transform: Callable[[Image.Image], Any]  # set by timm's create_loader

    def __init__(self, files: Sequence[Path], channels: int):
        self.files = files
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        try:
            return self.transform(read_image(self.files[index], self.channels)), index
        except UnreadableImageError:
            blank = Image.new("L" if self.channels == 1 else "RGB", (64, 64))
            return self.transform(blank), -1 - index


def image_loader(
    files: Sequence[Path], data: dict, batch_size: int, workers: int, device: torch.device
):
    """A loader of timm as its inference script sets it up: (images (B, C, H, W), indices (B,))."""
    return create_loader(
        ImageFiles(files, data["input_size"][0]),
        batch_size=batch_size,
        use_prefetcher=True,
        num_workers=workers if len(files) > batch_size else 0,
        persistent_workers=False,
        device=device,
        **data,
    )


def prepare(files: Sequence[Path], data: dict) -> tuple[Tensor, Tensor]:
    """Images as a network takes them, and the same as a person sees them.

    Args:
        files: Image files.
        data: The network's preprocessing.

    Returns:
        Both (B, C, H, W): normalised, and with values from 0 to 1.

    Raises:
        UnreadableImageError: For the first file that cannot be decoded.
    """
    transform = create_transform(**data, is_training=False)
    channels = data["input_size"][0]
    images = torch.stack([transform(read_image(file, channels)) for file in files])
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return images, (images * std + mean).clamp(0, 1)
