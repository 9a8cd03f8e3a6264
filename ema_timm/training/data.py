"""The images of a run: opened and checked, then read by timm's loaders."""

import sys
from dataclasses import dataclass
from pathlib import Path

from timm.data import create_loader
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ema_timm.data.check import check_readable
from ema_timm.data.folders import find_split
from ema_timm.data.image_folder import LabelledImages as Dataset
from ema_timm.data.splits import open_both
from ema_timm.errors import UserError
from ema_timm.training.processes import Process
from ema_timm.training.seeding import RepeatableImages
from ema_timm.training.settings import FinetuneConfig

_LISTED = 20
"""Up to so many classes their images are counted one by one."""


@dataclass(frozen=True)
class Images:
    """Images to train on, and images of the same classes to validate on."""

    train: Dataset
    val: Dataset

    def read_channels(self, channels: int) -> None:
        """Read them for a network of so many input channels; UserError if they have no such."""
        for dataset in (self.train, self.val):
            dataset.read_channels(channels)

    def describe(self) -> dict:
        """What identifies them in results and states; looks at every file."""
        return {
            split: {"images": len(dataset), "fingerprint": dataset.fingerprint()}
            for split, dataset in (("train", self.train), ("val", self.val))
        }


def open_images(config: FinetuneConfig, process: Process, progress: bool) -> Images:
    """Open both splits, decode every image, and tell what they hold.

    Raises:
        UserError: If a split or its images are missing, do not suit a classifier, or cannot be
            read.
    """
    train, val = open_both(config.data_dir, config.val_split, config.dataset)
    notes = [*train.notes, *val.notes, *_counts(train, val), *_left_for_the_end(config)]
    if Path(config.output, "training", "state.pt").exists():
        train.remedy = val.remedy = _remedy(config)  # of a run that continues
    if config.check:
        share = (process.rank, process.count)
        for dataset in (train, val):
            notes += check_readable(dataset, progress, decode=True, share=share)
    train.remedy = val.remedy = _remedy(config)
    if progress:
        for note in notes:
            tqdm.write(note, file=sys.stderr)
    return Images(train, val)


def _counts(train: Dataset, val: Dataset) -> list[str]:
    """Images of each class, and the classes that are not validated."""
    pairs = list(zip(train.class_names, train.class_counts(), val.class_counts(), strict=True))
    if len(pairs) <= _LISTED:
        listed = ", ".join(f"{name} {there}+{here}" for name, there, here in pairs)
        notes = [f"images to train on + to validate on, by class: {listed}"]
    else:
        few, many = min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])
        notes = [
            f"{len(pairs)} classes of {few[1]} ({few[0]}) to {many[1]} ({many[0]}) images to train "
            f"on, and {min(p[2] for p in pairs)} to {max(p[2] for p in pairs)} to validate on"
        ]
    without = [name for name, _, here in pairs if not here]
    if without:
        more = f" and {len(without) - _LISTED} more" if len(without) > _LISTED else ""
        notes.append(
            f"no images to validate on, so the accuracy does not speak of: "
            f"{', '.join(without[:_LISTED])}{more}"
        )
    return notes


def find_test(config: FinetuneConfig) -> Path | None:
    """The folder of images that are left for the end, where there is one."""
    test = find_split(config.data_dir, ("test",))
    if config.dataset or test is None or config.val_split.lower() == test.name.lower():
        return None
    return test


def _left_for_the_end(config: FinetuneConfig) -> list[str]:
    test = find_test(config)
    if test is None:
        return []
    return [
        f"{test} is left for the end: ema-timm evaluate {config.output} "
        f"--data-dir {config.data_dir} --split {test.name}"
    ]


def _remedy(config: FinetuneConfig) -> str:
    """What to do about an image that a run under way cannot read."""
    return (
        "Put the file back as it was, and go on with --resume (or start again, if no epoch was "
        "done yet). If it is lost, this run cannot go on: remove the file and train on from the "
        f"best weights, with --model local-dir:{config.output} and another --output."
    )


def train_loader(
    config: FinetuneConfig, dataset: RepeatableImages, preprocessing: dict, process: Process
) -> DataLoader:
    """Batches of augmented images, as timm makes them.

    Args:
        config: The run's settings.
        dataset: The images.
        preprocessing: What the network wants, as timm resolves it.
        process: This process, which gets its share of the images.

    Raises:
        UserError: If the images do not fill one batch.
    """
    loader = create_loader(
        dataset,
        is_training=True,
        interpolation="random",
        auto_augment=config.aa or None,
        re_prob=config.reprob,
        hflip=config.hflip,
        scale=(config.scale_min, 1.0),
        color_jitter=config.color_jitter or None,
        **_both(config, preprocessing, process),
    )
    if len(loader) == 0:
        raise UserError(
            f"--batch-size {config.batch_size} on {process.count} process(es) is more than "
            f"the {len(dataset)} training images. Use a smaller batch."
        )
    return loader


def val_loader(
    config: FinetuneConfig, dataset: Dataset, preprocessing: dict, process: Process
) -> DataLoader:
    """Batches of images as they will be classified; takes what `train_loader` takes."""
    return create_loader(
        dataset,
        is_training=False,
        interpolation=preprocessing["interpolation"],
        crop_pct=preprocessing["crop_pct"],
        crop_mode=preprocessing["crop_mode"],
        **_both(config, preprocessing, process),
    )


def _both(config: FinetuneConfig, preprocessing: dict, process: Process) -> dict:
    """What both loaders are told."""
    return {
        "input_size": preprocessing["input_size"],
        "batch_size": config.batch_size,
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "num_workers": config.workers,
        "distributed": process.count > 1,
        "device": process.device,
        "use_prefetcher": False,
        "pin_memory": process.device.type == "cuda",
        # Workers learn the number of the epoch, which the augmentation depends on, when they start.
        "persistent_workers": False,
    }
