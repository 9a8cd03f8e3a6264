"""Names of the classes, in the order of a network's outputs, and what they mean."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ema_timm.errors import UserError, sentence
from ema_timm.fields import check_fields, load_json


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
    forms = "Give a text file with one name a line, or a JSON list or object of names."
    try:
        if file.suffix == ".json":
            content = load_json(file, "utf-8-sig")
        else:
            content = file.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--labels: {file} cannot be read: {sentence(error)} {forms}") from error
    kind = {"*": str} if isinstance(content, dict) else [str]
    check_fields(content, kind, f"--labels: {file}", forms)
    if isinstance(content, dict):
        labels = Labels(list(content), content)
    else:
        labels = Labels([name.strip() for name in content if name.strip()])
    require_unique(labels.names, f"--labels: {file}")
    return labels


def require_unique(names: list[str], place: str) -> None:
    """Raise UserError for a class that ``place`` names twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{place} names {twice[0]!r} twice. Give each class a name of its own.")


def check_count(labels: Labels, classes: int, source: str) -> None:
    """Raise UserError unless there is one name for each class of the network."""
    if len(labels.names) != classes:
        raise UserError(
            f"the network has {classes} classes, but {source} names {len(labels.names)}. "
            "Give the names in the order of the outputs with --labels FILE."
        )
