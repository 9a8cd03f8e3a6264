"""The images of a run: opened and checked, then read by timm's loaders."""

import sys
from dataclasses import dataclass
from pathlib import Path

from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ema_timm.data.check import check_readable
from ema_timm.data.folders import find_split
from ema_timm.data.identical import identical_images
from ema_timm.data.image_folder import FolderDataset, LabelledImages
from ema_timm.data.splits import open_both
from ema_timm.errors import UserError, some
from ema_timm.training.processes import Process
from ema_timm.training.seeding import RepeatableImages

_LISTED = 20
"""The images of each class are listed for up to this many classes."""


@dataclass(frozen=True)
class Images:
    """The training images, and the validation images of the same classes.

    Attributes:
        identical: Number of validation images that are training images too.
    """

    train: LabelledImages
    val: LabelledImages
    identical: int = 0

    def read_channels(self, channels: int) -> None:
        """Read images with this many channels; UserError if they cannot be read so."""
        for dataset in (self.train, self.val):
            dataset.read_channels(channels)

    def describe(self) -> dict:
        """Number and fingerprint of the images, for results and states. Reads every file."""
        return {
            split: {"images": len(dataset), "fingerprint": dataset.fingerprint()}
            for split, dataset in (("train", self.train), ("val", self.val))
        }


def open_images(
    data_dir: str,
    dataset: str,
    split: str,
    val_split: str,
    output: str,
    process: Process,
    check: bool = True,
    progress: bool = False,
) -> Images:
    """Open both splits, decode every image, and print what they contain on stderr.

    Args:
        data_dir: Image folder, or the root of ``dataset``.
        dataset: Name of one of timm's data sets; empty for an image folder.
        split: Name of the split to validate on; empty for the usual names.
        val_split: Fraction of the training images to hold out and validate on instead.
        output: The run's folder, which messages refer to.
        process: This process, which decodes its share of the images.
        check: Decode every image.
        progress: Print messages.

    Raises:
        UserError: If a split or its images are missing, cannot be used to train a classifier, or
            cannot be read.
    """
    train, val = open_both(data_dir, split, val_split, dataset)
    for images in (train, val):
        _refuse_output_inside(images, output)
    notes = [*train.notes, *val.notes, *_counts(train, val)]
    test = find_test_folder(data_dir, dataset, split)
    if test is not None:
        notes.append(
            f"{test} is not used for training. To evaluate on it afterwards: ema-timm evaluate "
            f"{output} --data-dir {data_dir} --split {test.name}"
        )
    if Path(output, "training", "state.pt").exists():
        train.remedy = val.remedy = _remedy(output)  # of a run that resumes
    if check:
        share = (process.rank, process.count)
        for images in (train, val):
            notes += check_readable(images, progress, decode=True, share=share)
    train.remedy = val.remedy = _remedy(output)
    identical = identical_images(train, val) if process.main else []
    if identical:
        notes.append(_identical_note(val, identical))
    if progress:
        for note in notes:
            tqdm.write(note, file=sys.stderr)
    return Images(train, val, len(identical))


def find_test_folder(data_dir: str, dataset: str, split: str) -> Path | None:
    """The folder ``test`` of an image folder, unless the run validates on it."""
    test = find_split(data_dir, ("test",))
    if dataset or test is None or split.lower() == test.name.lower():
        return None
    return test


def timm_augmentation(
    aa: str, color_jitter: float, hflip: float, reprob: float, scale_min: float
) -> dict:
    """Arguments of timm's `create_loader` for these settings of `FinetuneConfig`.

    Raises:
        UserError: If timm cannot build the augmentation.
    """
    policy = {"auto_augment": aa or None, "color_jitter": color_jitter or None}
    try:
        create_transform(32, is_training=True, **policy)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"timm cannot build the augmentation: {str(error).rstrip('.')}. Correct --aa "
            "(examples: rand-m9-mstd0.5, augmix-m5-w4, original, 3a) or --color-jitter."
        ) from error
    crop = {"scale": (scale_min, 1.0), "interpolation": "random"}
    return {**policy, **crop, "hflip": hflip, "re_prob": reprob}


def create_loaders(
    train: RepeatableImages,
    val: LabelledImages,
    augmentation: dict,
    preprocessing: dict,
    process: Process,
    batch_size: int,
    workers: int,
) -> tuple[DataLoader, DataLoader]:
    """Batches of augmented training images, and of validation images as they will be in use.

    Args:
        train: The training images.
        val: The validation images.
        augmentation: Arguments from `timm_augmentation`.
        preprocessing: Preprocessing of the network, as timm resolves it.
        process: This process, which gets its share of the images.
        batch_size: Images in a batch of this process.
        workers: Number of data loader workers.

    Raises:
        UserError: If there are fewer training images than one batch needs.
    """
    shared = {
        **{key: preprocessing[key] for key in ("input_size", "mean", "std")},
        "batch_size": batch_size,
        "num_workers": workers,
        "distributed": process.count > 1,
        "device": process.device,
        "use_prefetcher": False,
        "pin_memory": process.device.type == "cuda",
        # Workers read the number of the epoch, which the augmentation depends on, when they start.
        "persistent_workers": False,
    }
    train_loader = create_loader(train, is_training=True, **augmentation, **shared)
    if len(train_loader) == 0:
        raise UserError(
            f"--batch-size {batch_size} on {process.count} process(es) is more than "
            f"the {len(train)} training images. Use a smaller batch."
        )
    evaluation = {key: preprocessing[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return train_loader, create_loader(val, is_training=False, **evaluation, **shared)


def _refuse_output_inside(images: LabelledImages, output: str) -> None:
    """Raise UserError for an output among the images: its figures would be images of a class."""
    if not isinstance(images, FolderDataset):
        return
    if Path(output).resolve().is_relative_to(Path(images.place).resolve()):
        raise UserError(
            f"--output {output} is inside {images.place}, so its figures would become images of a "
            "class. Give a folder outside of the images."
        )


def _identical_note(val: LabelledImages, identical: list[int]) -> str:
    return (
        f"Warning: {len(identical)} of the {len(val)} validation images are training images too, "
        f"such as {val.file_name(identical[0])}. The accuracy on them says little about new "
        "images. Remove them from one of the two splits."
    )


def _counts(train: LabelledImages, val: LabelledImages) -> list[str]:
    """Messages: the images of each class, and the classes without validation images."""
    counts = list(zip(train.class_names, train.class_counts(), val.class_counts(), strict=True))
    if len(counts) <= _LISTED:
        listed = ", ".join(f"{name} {trained}+{validated}" for name, trained, validated in counts)
        notes = [f"training + validation images of each class: {listed}"]
    else:
        few, many = min(counts, key=lambda c: c[1]), max(counts, key=lambda c: c[1])
        validated = [count for _, _, count in counts]
        notes = [
            f"{len(counts)} classes with {few[1]} ({few[0]}) to {many[1]} ({many[0]}) training "
            f"images, and {min(validated)} to {max(validated)} validation images"
        ]
    if without := [name for name, _, validated in counts if not validated]:
        notes.append(
            "classes without validation images, which the accuracy does not include: "
            + some(without, _LISTED)
        )
    return notes


def _remedy(output: str) -> str:
    """What to do about an image that a run cannot read after it has started."""
    return (
        "Put the file back as it was and continue with --resume (or start again, if no epoch has "
        "finished yet). If the file is lost, this run cannot continue: remove the file and train "
        f"on from the best weights with --model local-dir:{output} and another --output."
    )
