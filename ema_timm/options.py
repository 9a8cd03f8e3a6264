"""Settings of a dataclass as options of a command. Nothing here imports torch."""

import argparse
import ast
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ema_timm.errors import UserError, first_line


def option(
    default: Any, help: str, *, flag: bool = False, choices: tuple[str, ...] | None = None
) -> Any:
    """A setting that the command line offers.

    Args:
        default: Its value where none is given; also says its type.
        help: What ``--help`` says of it.
        flag: Offer it as ``--name`` and ``--no-name``.
        choices: The values that it takes; None takes any.

    Returns:
        The field of a dataclass.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "choices": choices})


def add_options(command: argparse.ArgumentParser, config: type) -> None:
    """Add one option for each setting of the dataclass ``config``."""
    for setting in fields(config):
        if setting.metadata:
            _add_option(command, setting)


def given_options(args: argparse.Namespace, config: type) -> dict:
    """The settings of ``config`` that were given on the command line, by name."""
    given = [(f, getattr(args, f.name)) for f in fields(config) if hasattr(args, f.name)]
    return {f.name: dict(value) if f.metadata.get("pairs") else value for f, value in given}


def spelled(values: dict, config: type) -> list[str]:
    """Settings of ``config`` as a command line says them: the inverse of `given_options`."""
    line = []
    for setting in fields(config):
        if setting.metadata and values.get(setting.name) is not None:
            line += _spell(setting, values[setting.name])
    return line


def _spell(setting, value) -> list[str]:
    flag = "--" + setting.name.replace("_", "-")
    if setting.metadata.get("pairs"):
        return [flag, *(f"{key}={_literal(each)}" for key, each in value.items())] if value else []
    if setting.metadata.get("flag"):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _literal(value: object) -> str:
    """What `pair` reads as ``value``."""
    plain = str(value)
    return plain if isinstance(value, str) and pair(f"k={plain}")[1] == value else repr(value)


def _add_option(command: argparse.ArgumentParser, setting) -> None:
    """One option for one setting; what is not given stays out of the namespace."""
    flag = "--" + setting.name.replace("_", "-")
    help = setting.metadata["help"]
    shown = {"default": argparse.SUPPRESS}
    if setting.metadata.get("pairs"):
        command.add_argument(flag, nargs="+", type=pair, metavar="KEY=VALUE", help=help, **shown)
    elif setting.metadata.get("several"):
        choices = setting.metadata["choices"]
        command.add_argument(flag, nargs="+", choices=choices, help=help, **shown)
    elif setting.metadata.get("flag"):
        command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help, **shown)
    else:
        kind = type(setting.default)
        if setting.default or kind is float:
            help = f"{help} (default: {setting.default})"
        choices = setting.metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        command.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help, **shown)


def pair(text: str) -> tuple[str, object]:
    """Read KEY=VALUE; the value as Python reads it, or as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


# MERGED: Settings of a run from a YAML file, as timm's ``train.py -c`` has them. No torch here.
def read_settings(file: str | Path, config: type) -> dict:
    """The settings that a YAML file gives, by name.

    Args:
        file: A mapping of names, as on the command line with ``_`` or ``-``, to values. An empty
            value is none.
        config: The dataclass whose fields the keys must be.

    Raises:
        UserError: If the file cannot be read, names what is no setting, or gives one a value of
            another type.
    """
    known = {setting.name: setting for setting in fields(config)}
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
