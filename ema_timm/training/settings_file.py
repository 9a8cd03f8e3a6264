"""Settings of a run from a YAML file, as timm's ``train.py -c`` has them. No torch here."""

from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ema_timm.errors import UserError, first_line
from ema_timm.training.settings import FinetuneConfig


def read_settings(file: str | Path) -> dict:
    """The settings that a YAML file gives, by name.

    Args:
        file: A mapping of names, as on the command line with ``_`` or ``-``, to values. An empty
            value is none.

    Raises:
        UserError: If the file cannot be read, names what is no setting, or gives one a value of
            another type.
    """
    known = {setting.name: setting for setting in fields(FinetuneConfig)}
    given = {}
    for key, value in _read(Path(file)).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"--config {file}: {key} is no setting of finetune.{hint}")
        if value is not None:
            given[name] = _typed(known[name], value, f"--config {file}: {key}")
    return given


def _read(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--config: {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config: {file} is no YAML: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {file} must hold lines such as lr: 0.001.")
    return content


def _typed(setting: Field, value: Any, where: str) -> Any:
    """``value`` as the command line would give it; UserError if it is of another type."""
    told = setting.metadata
    if told.get("pairs"):
        good, wanted = isinstance(value, dict), "a mapping"
    elif told.get("several"):
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and all(word in told["choices"] for word in value)
        wanted = f"a list of {', '.join(told['choices'])}"
    elif told.get("flag"):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(setting.default, str):
        good = isinstance(value, str | int | float) and not isinstance(value, bool)
        value, wanted = str(value), "text"
        if told.get("choices"):
            good, wanted = value in told["choices"], f"one of {', '.join(told['choices'])}"
    else:
        kind = type(setting.default)
        value = _number(kind, value)
        good, wanted = value is not None, "a whole number" if kind is int else "a number"
    if not good:
        raise UserError(f"{where} must be {wanted}.")
    return value


def _number(kind: type, value: Any) -> int | float | None:
    """A number of type ``kind``; text too, for YAML takes 5e-4 for text. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = kind(value)
    except ValueError:
        return None
    return number if isinstance(value, str) or number == value else None
