"""Reproducible runs: seeds, generator states, and augmentation that workers do not change."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from ema_timm.data.image_folder import LabelledImages


class RepeatableImages(Dataset):
    """Training images, each augmented with generators seeded by (seed, epoch, index).

    Data loader workers have their own generators. Without this class the outcome would depend on
    the number of workers.

    Args:
        images: The images.
        seed: The run's seed.

    Attributes:
        epoch: The current epoch, from 0. Workers copy it when they start.
    """

    def __init__(self, images: LabelledImages, seed: int):
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        with _generators_of(self.seed, self.epoch, index):
            return self.images[index]

    @property
    def transform(self) -> Callable | None:
        """The augmentation; timm's loader sets it."""
        return self.images.transform

    @transform.setter
    def transform(self, transform: Callable) -> None:
        """Set it on the images, which apply it when they are read."""
        self.images.transform = transform


@contextlib.contextmanager
def _generators_of(*key: int) -> Iterator[None]:
    """Seed the generators by ``key`` for this block, then restore their states."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # The extra 1 separates these seeds from those of an epoch; an extra 0 would change nothing.
    words = np.random.SeedSequence([*key, 1]).generate_state(3)
    # torch.manual_seed would also seed the GPU's generators, which drop path draws from.
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed every generator from (seed, epoch, rank), independently for each triple."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def get_rng_state() -> dict:
    """States of the generators that training draws from, as numbers and tensors."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict) -> None:
    """Restore the states that `get_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        # Only the GPU of this process counts. Older states have one entry for each GPU.
        current, states = torch.cuda.current_device(), state["cuda"]
        torch.cuda.set_rng_state(states[current if current < len(states) else 0])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
