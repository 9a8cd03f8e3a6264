"""timm's data sets by name, ``torch/NAME`` and ``hfds/NAME``, read as image folders are."""

import hashlib
import os
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL.Image import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from ema_timm.data.image_folder import LabelledImages, number
from ema_timm.errors import UserError, sentence

_KINDS = ("torch", "hfds")


class NamedDataset(LabelledImages):
    """A data set that timm opens.

    Args:
        inner: What `timm.data.create_dataset` gives: torchvision's data set, or timm's own around
            one of Hugging Face.
        name: Its name, with timm's prefix.
        split: The split's name.
        class_map: Class name to index; None takes the data set's own numbers.
    """

    def __init__(self, inner: Dataset, name: str, split: str, class_map: dict | None):
        place = f"{name}, split {split},"
        self.inner, self.hf = inner, getattr(inner, "reader", None)
        own = self.hf.class_to_idx if self.hf else getattr(inner, "class_to_idx", None)
        if not own or not (self.hf or hasattr(inner, "targets")):
            raise UserError(f"{place} has no class names. Give another data set.")
        class_to_idx = number(place, sorted(own, key=own.__getitem__), class_map)
        index = {of_class: class_to_idx[name] for name, of_class in own.items()}
        found = self.hf.dataset[self.hf.label_key] if self.hf else inner.targets
        self._own_targets = [int(target) for target in found]
        files = None if self.hf else getattr(inner, "samples", None)
        super().__init__(
            public_dataset_name(name),
            split,
            place,
            class_to_idx,
            [index[target] for target in self._own_targets],
            [path for path, _ in files] if files else None,
        )

    def source(self, index: int) -> str | BytesIO | Image:
        """See `LabelledImages.source`."""
        if self.paths:
            return self.paths[index]
        if not self.hf:
            return self.inner[index][0]
        with self.hf[index][0] as file:
            return BytesIO(file.read())

    def stamp(self, index: int) -> str:
        """See `LabelledImages.stamp`."""
        if self.paths:
            return super().stamp(index)
        return f"{self.hf.dataset._fingerprint}\t{index}" if self.hf else ""

    def fingerprint(self) -> str:
        """Sha256 over the class of every image, and its size in bytes or its pixels."""
        digest = hashlib.sha256(repr(self._own_targets).encode())
        if self.paths or self.hf:
            for index in range(len(self)):
                digest.update(f"\t{self.size(index)}".encode())
        else:
            digest.update(np.ascontiguousarray(self.inner.data).tobytes())
        return digest.hexdigest()

    def size(self, index: int) -> int:
        """See `LabelledImages.size`."""
        if not self.hf:
            return super().size(index)
        with self.hf[index][0] as file:
            return file.seek(0, os.SEEK_END)


def open_named(
    name: str, data_dir: str | Path, split: str, class_map: dict | None = None
) -> NamedDataset:
    """A split of a data set by timm's name.

    Args:
        name: ``torch/NAME`` of torchvision, or ``hfds/NAME`` of Hugging Face; NAME may be a folder.
        data_dir: The folder that holds it, or in which Hugging Face caches it.
        split: The split's name.
        class_map: Class name to index; None takes the data set's own numbers.

    Raises:
        UserError: If timm cannot open it, or its images have no numbers.
    """
    kind = name.partition("/")[0].lower()
    if kind not in _KINDS:
        raise UserError(
            f"--dataset {name}: a run that can continue exactly takes images by their number, "
            f"from {' or '.join(f'{kind}/NAME' for kind in _KINDS)} or a folder. Unpack the "
            "shards of a stream, or train on it with timm's train.py."
        )
    if not str(data_dir):
        raise UserError(
            f"--dataset {name} needs --data-dir, the folder that holds the data set, or in which "
            "Hugging Face keeps its downloads. Give one."
        )
    try:
        inner = create_dataset(name, root=str(data_dir), split=split)
    except (AssertionError, RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        raise UserError(
            f"--dataset {name}: timm cannot open its split {split}: {sentence(error)} Is it in "
            f"--data-dir {data_dir}, and the split's name right?"
        ) from error
    return NamedDataset(inner, name, split, class_map)


def public_dataset_name(name: str) -> str:
    """The name of a data set without the folders of this machine."""
    kind, _, rest = name.partition("/")
    return f"{kind}/{Path(rest).name}" if rest.startswith(("/", ".", "~")) else name
