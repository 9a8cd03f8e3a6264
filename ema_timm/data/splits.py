"""The images that settings name: a split of a folder, a part of it, or a timm data set."""

from pathlib import Path

from ema_timm.data.folders import TRAIN, VAL, find_split
from ema_timm.data.image_folder import LabelledImages, fraction, open_folder, split_folder
from ema_timm.data.named import open_named
from ema_timm.errors import UserError


def open_measured(
    data_dir: str | Path,
    split: str = "",
    val_split: str = "",
    dataset: str = "",
    class_map: dict | None = None,
) -> LabelledImages:
    """The images to measure on.

    Args:
        data_dir: An image folder, or where ``dataset`` lies.
        split: The split's name; empty for the one to validate on.
        val_split: The fraction that training held out, in place of a split.
        dataset: timm's name of a data set; empty for a folder.
        class_map: Class name to index; None takes the order of the names.

    Raises:
        UserError: If there are none, or they have a class that is not in ``class_map``.
    """
    part = _held_out(split, val_split, dataset)
    if dataset:
        return open_named(dataset, data_dir, split or VAL[1], class_map)
    if part is not None:
        return split_folder(data_dir, part, class_map)[1]
    return open_folder(data_dir, (split,) if split else VAL, class_map)


def open_both(
    data_dir: str | Path, split: str = "", val_split: str = "", dataset: str = ""
) -> tuple:
    """The images to train on, and those to validate on, which have no other classes.

    Takes and raises as `open_measured`.
    """
    part = _held_out(split, val_split, dataset)
    if part is None:
        train = open_named(dataset, data_dir, TRAIN[0]) if dataset else open_folder(data_dir, TRAIN)
        check_classes(train)
        return train, open_measured(data_dir, split, "", dataset, train.class_to_idx)
    given = find_split(data_dir, VAL)
    if given is not None:
        raise UserError(
            f"--val-split {val_split} holds out images to validate on, but {given} contains some. "
            "Leave --val-split out, or move that folder away."
        )
    train, val = split_folder(data_dir, part)
    check_classes(train)
    return train, val


def class_names(data_dir: str | Path, split: str, val_split: str, dataset: str) -> list[str]:
    """Class names of the images to train on, else of those to measure on."""
    if not dataset and find_split(data_dir, TRAIN):
        return open_folder(data_dir, TRAIN).class_names
    return open_measured(data_dir, split, val_split, dataset).class_names


def check_classes(train: LabelledImages) -> None:
    """Raise UserError for fewer than two classes."""
    if len(train.class_to_idx) < 2:
        raise UserError(
            f"{train.place} has one class ({train.class_names[0]}), but a classifier needs at "
            "least two. Put each class into its own folder."
        )


def _held_out(split: str, val_split: str, dataset: str) -> float | None:
    """The fraction that is held out, or None.

    Raises:
        UserError: If it is not a fraction, or is not allowed with the other options.
    """
    part = fraction(val_split)
    if part is not None and split:
        raise UserError(f"--split {split} excludes --val-split {val_split}. Leave one of them out.")
    if part is not None and dataset:
        raise UserError(
            f"--val-split {val_split} works only with image folders. To validate on a split of "
            "--dataset, name it, for example --split test."
        )
    return part
