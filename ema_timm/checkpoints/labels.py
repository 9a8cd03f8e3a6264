"""Names of the classes, in the order of a network's outputs, and what they mean."""

import json
from dataclasses import dataclass
from pathlib import Path

from ema_timm.errors import UserError
from ema_timm.repeated import unique


@dataclass(frozen=True)
class Labels:
    """Class names, and descriptions by name if there are some."""

    names: list[str]
    descriptions: dict[str, str] | None = None


def read_labels(file: str | Path) -> Labels:
    """Read class names in the order of the outputs.

    Args:
        file: A text file with one name a line, or a JSON file with a list of names or an object
            of names and their descriptions.

    Raises:
        UserError: If it is missing, has another format, or names a class twice.
    """
    file = Path(file)
    try:
        text = file.read_text("utf-8")
        names = text.split("\n")
        content = json.loads(text, object_pairs_hook=unique) if file.suffix == ".json" else names
    except (OSError, ValueError) as error:
        raise UserError(f"--labels: {file} cannot be read: {error}.") from error
    if isinstance(content, dict):
        labels = Labels(list(content), {str(k): str(v) for k, v in content.items()})
    elif isinstance(content, list) and all(isinstance(name, str) for name in content):
        labels = Labels([name.strip() for name in content if name.strip()])
    else:
        raise UserError(
            f"--labels: {file} must hold a list of names, or an object of names and descriptions."
        )
    twice = {name for name in labels.names if labels.names.count(name) > 1}
    if twice:
        raise UserError(f"--labels: {file} names {sorted(twice)[0]!r} twice.")
    return labels


def check_count(labels: Labels, classes: int, source: str) -> None:
    """Raise UserError unless there is one name for each class of the network."""
    if len(labels.names) != classes:
        raise UserError(
            f"the network has {classes} classes, but {source} names {len(labels.names)}. "
            "Give the names in the order of the outputs with --labels FILE."
        )
