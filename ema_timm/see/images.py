"""The image files that a command names, prepared as a network takes them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader, create_transform
from torch import Tensor
from torch.utils.data import Dataset

from ema_timm.data.folders import images_below
from ema_timm.data.images import mode_of, read_image
from ema_timm.errors import UnreadableImageError, UserError


def find_images(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files as given, and of each folder all images in it, in natural order.

    Returns:
        The files, and sentences on what was skipped in the folders.

    Raises:
        UserError: If there is no such file, or a folder has no images or cannot be listed.
    """
    found: list[Path] = []
    notes: list[str] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside, skipped = images_below(path)
            if not inside:
                raise UserError(f"there are no images in {path}. Give a folder that has some.")
            found += map(Path, inside)
            notes += skipped
        elif path.exists():  # read_image says what is wrong with one that is not a file
            found.append(path)
        else:
            raise UserError(f"there is no image or folder {path}. Correct the name.")
    return found, notes


def keep_images(files: Sequence[Path], option: str, picture: str | Path) -> None:
    """Raise UserError if the file to write is one of the images, which it would replace."""
    if os.path.exists(picture) and any(os.path.samefile(picture, file) for file in files):
        raise UserError(
            f"{option} {picture} is one of the images, which it would replace. Give another name."
        )


class ImageFiles(Dataset):
    """Files for timm's loader, each with its index; -1 - index stands for one it cannot read.

    Args:
        files: The files.
        channels: 1 or 3.
    """

    transform: Callable[[Image.Image], Any]  # set by timm's create_loader

    def __init__(self, files: Sequence[Path], channels: int):
        self.files = files
        self.mode = mode_of(channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        try:
            return self.transform(read_image(self.files[index], self.mode)), index
        except UnreadableImageError:
            return self.transform(Image.new(self.mode, (64, 64))), -1 - index


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
    """Images as a network takes them, and the same images as a person sees them.

    Args:
        files: Image files.
        data: The network's preprocessing.

    Returns:
        Both (B, C, H, W): normalised, and with values from 0 to 1.

    Raises:
        UnreadableImageError: For the first file that cannot be decoded.
    """
    transform = create_transform(**data, is_training=False)
    mode = mode_of(data["input_size"][0])
    images = torch.stack([transform(read_image(file, mode)) for file in files])
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return images, (images * std + mean).clamp(0, 1)
