"""The images of a run: opened and checked, then read by timm's loaders."""

from dataclasses import dataclass

from timm.data import create_loader
from torch.utils.data import DataLoader

from ema_timm.errors import UserError
from ema_timm.measure.data import TRAIN, VAL, FolderDataset, check_readable, open_folder
from ema_timm.training.processes import Process
from ema_timm.training.repeatable import RepeatableImages
from ema_timm.training.settings import FinetuneConfig


@dataclass(frozen=True)
class Images:
    """Images to train on, and images of the same classes to validate on."""

    train: FolderDataset
    val: FolderDataset

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


def open_images(config: FinetuneConfig, progress: bool) -> Images:
    """Open both splits of the image folder and check every image.

    Raises:
        UserError: If a split or its images are missing, do not suit a classifier, or cannot be
            read.
    """
    train = open_folder(config.data_dir, TRAIN)
    if len(train.class_to_idx) < 2:
        raise UserError(
            f"{train.reader.root} has one class ({train.class_names[0]}), and a classifier needs "
            "at least two. Put each class in a folder of its own."
        )
    val = open_folder(config.data_dir, VAL, train.class_to_idx)
    for dataset in (train, val):
        check_readable(dataset, progress)
    return Images(train, val)


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
    config: FinetuneConfig, dataset: FolderDataset, preprocessing: dict, process: Process
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
