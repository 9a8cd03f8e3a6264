"""The rows of a YOLO model YAML, and how references move when rows are inserted.

A row is ``[from, number, module, arguments]``; ``backbone`` and ``head`` are one list of rows.
``from`` names rows by index, or backwards if negative; -1 is the row before.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from ema_timm.errors import UserError

NAME = "EmaAttn"
"""The layer's name in a row."""

PLACES = ("head", "backbone", "neck", "all")
"""Parts of a network after whose rows layers go, by name."""

IMAGE = -1
"""In place of a row's index: the image, which the first row reads."""


@dataclass(frozen=True)
class Insertion:
    """A model YAML with rows inserted.

    Attributes:
        config: The new YAML's content; rows that moved have their ``from`` rewritten.
        moved: New index of each old row.
    """

    config: dict
    moved: tuple[int, ...]


def rows_of(config: dict) -> list[list]:
    """All rows, the backbone's first.

    Raises:
        UserError: If ``config`` is not made of rows.
    """
    parts = [config.get("backbone"), config.get("head")]
    rows = [row for part in parts if isinstance(part, list | tuple) for row in part]
    well_formed = all(isinstance(row, list | tuple) and len(row) == 4 for row in rows)
    if not all(parts) or not well_formed:
        raise UserError(
            "a YOLO model YAML has the lists 'backbone' and 'head' of rows [from, number, module, "
            "arguments], but this one has not. Give a model YAML, or a checkpoint built from one."
        )
    return [list(row) for row in rows]


def sources(index: int, row: Sequence) -> list[int]:
    """Indices of the rows that row ``index`` reads; `IMAGE` for the image."""
    froms = [row[0]] if isinstance(row[0], int) else row[0]
    found = [f if f >= 0 else index + f for f in froms]
    if not all(IMAGE <= f < index for f in found):
        raise UserError(
            f"row {index} reads {row[0]}, but a row can only read earlier rows. Correct the YAML."
        )
    return found


def insert_rows(config: dict, after: Iterable[int], row: Sequence) -> Insertion:
    """Insert a copy of ``row`` after each of some rows; their readers read the copy instead.

    Args:
        config: Content of a model YAML; not changed.
        after: Indices of rows.
        row: The row, with -1 as its ``from``.
    """
    rows = rows_of(config)
    after = set(after)
    moved = tuple(i + sum(j < i for j in after) for i in range(len(rows)))
    # Where the output of an old row now comes from.
    output = {i: new + (i in after) for i, new in enumerate(moved)}
    output[IMAGE] = IMAGE
    new_parts: dict[str, list] = {"backbone": [], "head": []}
    for index, old in enumerate(rows):
        part = new_parts["backbone" if index < len(config["backbone"]) else "head"]
        part.append([_moved_from(index, old, moved[index], output), *copy.deepcopy(old[1:])])
        if index in after:
            part.append(copy.deepcopy(list(row)))
    return Insertion({**copy.deepcopy(config), **new_parts}, moved)


def _moved_from(index: int, row: Sequence, new_index: int, output: dict[int, int]):
    """``from`` of an old row in the new YAML; negative numbers stay negative."""
    froms = [row[0]] if isinstance(row[0], int) else row[0]
    new = [
        output[source] - new_index * (f < 0)
        for f, source in zip(froms, sources(index, row), strict=True)
    ]
    return new[0] if isinstance(row[0], int) else new


def yaml_text(config: dict) -> str:
    """A model YAML as a file that builds the same network under any file name.

    ultralytics reads the scale from the file's name and else takes the first: the network's own
    scale is written first.
    """
    content = {k: v for k, v in config.items() if k not in ("yaml_file", "scale", "ch", "channels")}
    rows = {part: content.pop(part) for part in ("backbone", "head")}
    scales, own = content.get("scales"), config.get("scale")
    if scales and own in scales:
        content["scales"] = {own: scales[own], **scales}
    # In PyYAML's mixed style a mapping of only numbers is one line in braces, and rows after it are
    # not valid YAML.
    mixed = None if any(isinstance(v, dict | list) for v in content.values()) else False
    settings = yaml.safe_dump(content, sort_keys=False, default_flow_style=mixed).rstrip()
    lines = [settings] if content else []
    number = 0
    for part, listed in rows.items():
        lines += ["", f"{part}:", "  # [from, number, module, arguments]"]
        for row in listed:
            written = yaml.safe_dump(list(row), default_flow_style=True, width=1000).strip()
            lines.append(f"  - {written}  # {number}")
            number += 1
    return "# EMA attention (pip install ema-timm)\n" + "\n".join(lines) + "\n"
