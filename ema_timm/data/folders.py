"""The splits, classes and images of an image folder. Everything that is skipped is reported.

A class is a folder directly in its split, and its images are directly in it. timm's reader takes
the innermost folder for the class, torchvision's the outermost. If the two differ, it is an error.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key

from ema_timm.data.images import image_suffixes
from ema_timm.errors import UserError, some
from ema_timm.names import encodable

TRAIN = ("train",)
VAL = ("val", "validation")
SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "evaluation"))
"""Other names of a split's folder, as timm has them."""


@dataclass
class Listing:
    """The images of a split, in natural order of their classes and names.

    Args:
        root: The folder that holds the class folders.
        name: Name of the data.
        split: Name of the split.
        images: Pairs of a path and its class.
        notes: Sentences on what was skipped.
    """

    root: Path
    name: str
    split: str
    images: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Class names in natural order, as timm numbers them."""
        return sorted({name for _, name in self.images}, key=natural_key)


def find_split(data_dir: str | Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a split: the first of ``names`` and their synonyms that exists, in any case."""
    try:
        folders = sorted(entry.name for entry in os.scandir(data_dir) if entry.is_dir())
    except OSError:
        return None
    also = [name for group in SYNONYMS if set(group) & set(names) for name in group]
    for name in dict.fromkeys((*names, *also)):
        alike = [folder for folder in folders if folder.lower() == name.lower()]
        if alike:
            return Path(data_dir) / (name if name in alike else alike[0])
    return None


def list_images(root: Path) -> Listing:
    """List the images in the class folders of a split.

    Args:
        root: The split's folder.

    Raises:
        UserError: If there are no images, images outside of class folders or in folders inside
            them, a folder twice, or a class without any image that can be read here.
    """
    listing = Listing(root, encodable(root.resolve().parent.name), encodable(root.name))
    skipped, seen = _Skipped(), {os.path.realpath(root): str(root)}
    for entry in _entries(root):
        if _hidden(entry.name):
            skipped.hidden.append(entry.name)
        elif entry.is_dir():
            _list_class(entry, listing, skipped, seen)
        elif _is_image(entry.name):
            raise UserError(
                f"{entry.path} is not in a class folder. Move it into the folder of its class, or "
                "out of the data."
            )
    if not listing.images:
        only = f", only {some(list(skipped.others), 5)}" if skipped.others else ""
        raise UserError(
            f"{root} has no images in class folders{only}. Put them at {root}/CLASS/image.jpg."
        )
    if skipped.unread:
        raise UserError(
            f"{skipped.unread[0]} holds files, but none that Pillow reads as an image here "
            f"({some(list(skipped.others), 5)}). Convert them, install Pillow's plug-in for them, "
            "or move the folder away."
        )
    listing.images.sort(key=lambda pair: natural_key(pair[0]))
    listing.notes = skipped.notes(root)
    return listing


def images_below(root: Path) -> tuple[list[str], list[str]]:
    """The images in a folder and in folders inside it, whatever their classes.

    Args:
        root: The folder.

    Returns:
        Their paths in natural order, and sentences on what was skipped.

    Raises:
        UserError: If a folder cannot be read, or a link leads to a folder a second time.
    """
    found: list[str] = []
    skipped, seen, folders = _Skipped(), {os.path.realpath(root): str(root)}, [root]
    while folders:
        for entry in _entries(folders.pop()):
            name = os.path.relpath(entry.path, root)
            if _hidden(entry.name):
                skipped.hidden.append(name)
            elif entry.is_dir():
                _check_new(entry, seen)
                folders.append(Path(entry.path))
            elif _is_image(entry.name):
                found.append(entry.path)
            else:
                skipped.others[_kind(entry.name)] += 1
    return sorted(found, key=natural_key), skipped.notes(root)


@dataclass
class _Skipped:
    """What a listing skips. Folders that hold files but no image are ``unread``."""

    hidden: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)

    def notes(self, root: Path) -> list[str]:
        notes = []
        if self.hidden:
            notes.append(
                f"{root}: {len(self.hidden)} hidden files and folders skipped "
                f"({some(self.hidden, 5)})"
            )
        if self.others:
            kinds = [f"{count} {suffix}" for suffix, count in self.others.most_common()]
            notes.append(f"{root}: files skipped because they are not images ({some(kinds, 5)})")
        if self.empty:
            notes.append(f"{root}: empty folders skipped ({some(self.empty, 5)})")
        return notes


def _list_class(folder: os.DirEntry, listing: Listing, skipped: _Skipped, seen: dict) -> None:
    _check_new(folder, seen)
    _check_name(folder)
    images, others = [], Counter()
    for entry in _entries(folder.path):
        if _hidden(entry.name):
            skipped.hidden.append(f"{folder.name}/{entry.name}")
        elif entry.is_dir():
            _check_no_images(entry, dict(seen))
        elif _is_image(entry.name):
            images.append((entry.path, folder.name))
        else:
            others[_kind(entry.name)] += 1
    if not images:
        (skipped.unread if others else skipped.empty).append(folder.path)
    skipped.others += others
    listing.images += images


def _check_new(folder: os.DirEntry, seen: dict) -> None:
    """Raise UserError for a folder that a link reaches a second time, such as the link's own."""
    place = os.path.realpath(folder.path)
    if place in seen:
        raise UserError(
            f"{folder.path} is the same folder as {seen[place]}, through a link. Remove the link."
        )
    seen[place] = folder.path


def _check_name(folder: os.DirEntry) -> None:
    """Raise UserError for a class whose name no text file can hold."""
    if encodable(folder.name) != folder.name:
        raise UserError(
            f"the name of the class folder {encodable(folder.path)} is not UTF-8. Rename it."
        )


def _check_no_images(folder: os.DirEntry, seen: dict) -> None:
    """Raise UserError for images in a folder inside a class, at any depth."""
    _check_new(folder, seen)
    for entry in _entries(folder.path):
        if _hidden(entry.name):
            continue
        if entry.is_dir():
            _check_no_images(entry, seen)
        elif _is_image(entry.name):
            raise UserError(
                f"{entry.path} is in a folder inside a class folder, so its class is not clear. "
                "Put all images at CLASS/image.jpg."
            )


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise UserError(
            f"cannot read the folder {folder}: {error.strerror}. Make it readable."
        ) from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _kind(name: str) -> str:
    """What a message calls a file that is not an image: its suffix, if it has one."""
    return Path(name).suffix or name


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()
