"""What a fine-tuning run is put together from, each part checked: data, optimiser, loss."""

import dataclasses
from pathlib import Path

import torch
from timm.data import Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ema_timm.errors import UserError
from ema_timm.measure.data import TRAIN, VAL, FolderDataset, check_readable, open_folder
from ema_timm.training.settings import FinetuneConfig


def check_settings(config: FinetuneConfig) -> None:
    """Raise UserError for settings that cannot work together."""
    if config.epochs < 1 or config.batch_size < 1:
        raise UserError("--epochs and --batch-size must be at least 1.")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise UserError(
            "--mixup and --cutmix pair the images of a batch: --batch-size must be even."
        )
    if config.weights and not Path(config.weights).is_file():
        raise UserError(f"--weights: there is no file {config.weights}.")


def open_data(config: FinetuneConfig, progress: bool) -> tuple[FolderDataset, FolderDataset]:
    """The training and validation images, checked; UserError says what is wrong with them."""
    train = open_folder(config.data_dir, TRAIN)
    if len(train.class_to_idx) < 2:
        raise UserError(
            f"{train.reader.root} has one class ({train.class_names[0]}), and a classifier needs "
            "at least two. Put each class in a folder of its own."
        )
    val = open_folder(config.data_dir, VAL, train.class_to_idx)
    for dataset in (train, val):
        check_readable(dataset, progress)
    return train, val


def describe_data(dataset: FolderDataset) -> dict:
    """What identifies a data set in results and states."""
    return {"images": len(dataset), "fingerprint": dataset.fingerprint()}


def public_arguments(config: FinetuneConfig) -> dict:
    """All settings, for results that are published: names of folders, not where they are."""
    arguments = dataclasses.asdict(config)
    for key in ("data_dir", "output", "weights"):
        arguments[key] = Path(arguments[key]).name
    if config.model.startswith("local-dir:"):
        arguments["model"] = f"local-dir:{Path(config.model.removeprefix('local-dir:')).name}"
    return arguments


def loaders(
    config: FinetuneConfig,
    train_data: FolderDataset,
    val_data: FolderDataset,
    data: dict,
    device: torch.device,
    world_size: int,
) -> tuple:
    """Loaders of timm for training and validation; ``data`` is its preprocessing."""
    common = {
        "input_size": data["input_size"],
        "batch_size": config.batch_size,
        "mean": data["mean"],
        "std": data["std"],
        "num_workers": config.workers,
        "distributed": world_size > 1,
        "device": device,
        "use_prefetcher": False,
        "pin_memory": device.type == "cuda",
        # Workers that outlive an epoch keep generators that a resumed run cannot have.
        "persistent_workers": False,
    }
    train = create_loader(
        train_data,
        is_training=True,
        interpolation="random",
        auto_augment=config.aa or None,
        re_prob=config.reprob,
        hflip=config.hflip,
        scale=(config.scale_min, 1.0),
        color_jitter=config.color_jitter or None,
        **common,
    )
    val = create_loader(
        val_data,
        is_training=False,
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        **common,
    )
    return train, val


def optimizer_and_scheduler(config: FinetuneConfig, model: nn.Module, steps: int):
    """Optimiser and scheduler of timm; ``steps`` is the number of steps in an epoch."""
    option = f"--opt {config.opt}"
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay or None,
        )
        option = f"--sched {config.sched}"
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {option}: {error}") from error
    if scheduler is None:
        raise UserError(f"timm has no scheduler for {option}; cosine, step and poly are some.")
    return optimizer, scheduler


def mixup_and_loss(config: FinetuneConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup, or None, and the training loss that goes with it."""
    if config.mixup or config.cutmix:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
        return mixup, SoftTargetCrossEntropy()
    if config.smoothing:
        return None, LabelSmoothingCrossEntropy(config.smoothing)
    return None, nn.CrossEntropyLoss()


def check_same_run(state: dict, identity: dict) -> None:
    """Refuse to continue a run under settings that would change its outcome."""
    saved = state["identity"]
    for name, value in identity["arguments"].items():
        if saved["arguments"].get(name) != value:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"cannot resume: {option} is {value!r} and the run was started with "
                f"{saved['arguments'].get(name)!r}. Leave it out, or start anew with another "
                "--output."
            )
    if saved["processes"] != identity["processes"]:
        raise UserError(
            f"cannot resume on {identity['processes']} process(es): the run was started on "
            f"{saved['processes']}."
        )
    if saved["data"] != identity["data"]:
        raise UserError(
            "cannot resume: the images in --data-dir are not those the run was started on. "
            "Restore them, or start anew with another --output."
        )
