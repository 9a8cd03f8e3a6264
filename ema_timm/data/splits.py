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
        val_split: The same, or the part that training set aside.
        dataset: timm's name of a data set; empty for a folder.
        class_map: Class name to index; None takes the order of the names.

    Raises:
        UserError: If there are none, or they have a class that is not in ``class_map``.
    """
    part = fraction(val_split)
    if dataset:
        _check_no_part(part, val_split)
        return open_named(dataset, data_dir, split or val_split or VAL[1], class_map)
    if part is not None:
        return split_folder(data_dir, part, class_map)[1]
    given = split or val_split
    return open_folder(data_dir, (given,) if given else VAL, class_map)


def open_both(data_dir: str | Path, val_split: str = "", dataset: str = "") -> tuple:
    """The images to train on, and those to validate on, which have no other classes.

    Takes and raises as `open_measured`.
    """
    part = fraction(val_split)
    if part is None:
        train = open_named(dataset, data_dir, TRAIN[0]) if dataset else open_folder(data_dir, TRAIN)
        check_classes(train)
        return train, open_measured(data_dir, "", val_split, dataset, train.class_to_idx)
    if dataset:
        _check_no_part(part, val_split)
    given = find_split(data_dir, VAL)
    if given is not None:
        raise UserError(
            f"--val-split {val_split} sets images aside to validate on, but {given} holds some. "
            "Leave --val-split out, or remove that folder."
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


def _check_no_part(part: float | None, val_split: str) -> None:
    if part is not None:
        raise UserError(
            f"--val-split {val_split} divides folders. For a data set by name give a split, such "
            "as --val-split test."
        )
