"""Augmentation that depends on seed, epoch and image alone, whichever process makes it."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import Dataset

from ema_timm.data.image_folder import LabelledImages as Images
from ema_timm.errors import UserError
from ema_timm.training.settings import FinetuneConfig


class RepeatableImages(Dataset):
    """Training images, each augmented with generators seeded by (seed, epoch, index).

    Loader processes have generators of their own, so that what those happen to hold would make
    the outcome depend on how many there are.

    Args:
        images: The images.
        seed: The run's seed.

    Attributes:
        epoch: The epoch that the images are read for, from 0. Loader processes take over what it
            is when they start.
    """

    def __init__(self, images: Images, seed: int):
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
        """Set it, on the images: they apply it where they are read."""
        self.images.transform = transform


@contextlib.contextmanager
def _generators_of(*key: int) -> Iterator[None]:
    """Draw from generators seeded by ``key`` in this block, and leave them as they were before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # The word more keeps them apart from the generators of an epoch; 0 would be no word more.
    words = np.random.SeedSequence([*key, 1]).generate_state(3)
    # Not torch.manual_seed, which seeds the GPU's generators too: drop path draws from them.
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def check_augmentation(config: FinetuneConfig) -> None:
    """Raise UserError for an augmentation that timm cannot build."""
    try:
        create_transform(
            32,
            is_training=True,
            auto_augment=config.aa or None,
            color_jitter=config.color_jitter or None,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"timm cannot build the augmentation: {str(error).rstrip('.')}. Correct --aa "
            "(rand-m9-mstd0.5, augmix-m5-w4, original and 3a are some) or --color-jitter."
        ) from error


# MERGED: What makes a run repeatable: seeds, and the generators' states.
def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed every generator from (seed, epoch, rank), independently for each triple."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def get_rng_state() -> dict:
    """The states of the generators that training draws from, as plain numbers and tensors."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict) -> None:
    """Restore what `get_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
