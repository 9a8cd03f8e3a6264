"""timm's data sets by name: ``torch/NAME`` and ``hfds/NAME``, read as image folders are."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from ema_timm.data.image_folder import mode_of, number
from ema_timm.data.images import Seen, look, read_image
from ema_timm.errors import UserError

_KINDS = ("torch", "hfds")


class NamedDataset(Dataset):
    """A data set that timm opens, except that an unreadable image is an error.

    Args:
        inner: What `timm.data.create_dataset` gives: torchvision's data set, or timm's own around
            one of Hugging Face.
        name: Its name, with timm's prefix.
        split: The split's name.
        class_map: Class name to index; None takes the data set's own numbers.
    """

    def __init__(self, inner: Dataset, name: str, split: str, class_map: dict | None):
        self.inner, self.name, self.split = inner, public_name(name), split
        self.place, self.notes = f"{name}, split {split},", []
        self.remedy = "Repair or remove it."
        self.transform, self.input_img_mode = None, "RGB"
        self.hf = getattr(inner, "reader", None)
        own = self.hf.class_to_idx if self.hf else getattr(inner, "class_to_idx", None)
        if not own or not (self.hf or hasattr(inner, "targets")):
            raise UserError(f"{self.place} has no names of classes. Take one of another kind.")
        self.class_to_idx = number(self.place, sorted(own, key=own.__getitem__), class_map)
        self._index = {index: self.class_to_idx[of_class] for of_class, index in own.items()}
        self.paths = None
        if not self.hf and hasattr(inner, "samples"):
            self.paths = [path for path, _ in inner.samples]

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index: int):
        image, target = self._read(index)
        return self.transform(image), self._index[int(target)]

    def _read(self, index: int) -> tuple[Image.Image, int]:
        how = (self.input_img_mode, self.file_name(index), self.remedy)
        if self.paths:
            return read_image(self.paths[index], *how), self.inner.targets[index]
        if self.hf:
            file, target = self.hf[index]
            with file:
                return read_image(file, *how), target
        image, target = self.inner[index]
        return image.convert(self.input_img_mode), target

    def _targets(self) -> list[int]:
        targets = self.hf.dataset[self.hf.label_key] if self.hf else self.inner.targets
        return [int(target) for target in targets]

    def read_channels(self, channels: int) -> None:
        """Read greyscale images for a network of one input channel, RGB for one of three.

        Raises:
            UserError: For any other number.
        """
        self.input_img_mode = mode_of(channels)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def class_counts(self) -> list[int]:
        """Images of each class, in the order of their indices."""
        counts = Counter(self._index[target] for target in self._targets())
        return [counts[self.class_to_idx[name]] for name in self.class_names]

    def file_name(self, index: int) -> str:
        """What to call an image in an error."""
        return self.paths[index] if self.paths else f"image {index} of {self.name}, {self.split}"

    def look(self, index: int, decode: bool) -> Seen | Exception:
        """See `ema_timm.data.images.look`; what is held in memory is whole."""
        if self.paths:
            return look(self.paths[index], decode)
        if self.hf:
            with self.hf[index][0] as file:
                return look(file, decode)
        return Seen(0, 0)

    def stamp(self, index: int) -> str:
        """What changes when somebody changes the image."""
        if self.paths:
            found = os.stat(self.paths[index])
            path = os.path.abspath(self.paths[index])
            return f"{path}\t{found.st_size}\t{found.st_mtime_ns}"
        return f"{self.hf.dataset._fingerprint}\t{index}" if self.hf else ""

    def fingerprint(self) -> str:
        """Sha256 over the class of every image, and its size in bytes or its pixels."""
        digest = hashlib.sha256(repr(self._targets()).encode())
        for index in range(len(self)):
            if self.paths:
                size = os.path.getsize(self.paths[index])
            elif self.hf:
                with self.hf[index][0] as file:
                    size = file.seek(0, os.SEEK_END)
            else:
                break
            digest.update(f"\t{size}".encode())
        if not self.paths and not self.hf:
            digest.update(np.ascontiguousarray(self.inner.data).tobytes())
        return digest.hexdigest()


def open_named(
    name: str, data_dir: str | Path, split: str, class_map: dict | None = None
) -> NamedDataset:
    """A split of a data set by timm's name.

    Args:
        name: ``torch/NAME`` of torchvision, or ``hfds/NAME`` of Hugging Face, a folder too.
        data_dir: Where it lies, or where Hugging Face keeps it.
        split: The split's name.
        class_map: Class name to index; None takes the data set's own numbers.

    Raises:
        UserError: If timm does not open it, or its images cannot be taken by their number.
    """
    kind = name.partition("/")[0].lower()
    if kind not in _KINDS:
        raise UserError(
            f"--dataset {name}: a run that can continue exactly takes images by their number, "
            f"from {' or '.join(f'{kind}/NAME' for kind in _KINDS)} or a folder. Unpack the "
            "shards of a stream, or train on it with timm's train.py."
        )
    try:
        inner = create_dataset(name, root=str(data_dir), split=split)
    except (AssertionError, RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--dataset {name}: timm cannot open its split {split}: {reason[0]} Is it in "
            f"--data-dir {data_dir}, and the split's name right?"
        ) from error
    return NamedDataset(inner, name, split, class_map)


def public_name(name: str) -> str:
    """The name of a data set without the folders of this machine."""
    kind, _, rest = name.partition("/")
    return f"{kind}/{Path(rest).name}" if rest.startswith(("/", ".", "~")) else name
