"""Settings of a dataclass, given on the command line or in a YAML file. Imports no torch."""

import argparse
import ast
import math
import reprlib
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ema_timm.errors import UserError, sentence
from ema_timm.fields import load_yaml
from ema_timm.repeated import Once, Pairs


def option(
    default: Any,
    help: str,
    *,
    flag: bool = False,
    choices: tuple[str, ...] | None = None,
    group: str = "",
    once: bool = False,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A setting that is also an option of the command line.

    Args:
        default: Default value. Its type is the type of the option.
        help: Text for ``--help``, which appends the default unless the text gives it.
        flag: Offer it as ``--name`` and ``--no-name``.
        choices: Allowed values; None allows any.
        group: Title of the group of options in ``--help`` that starts with this one.
        once: Refuse the option if it is repeated, because its text holds several values.
        least: Smallest allowed number, for `check_ranges`.
        most: Largest allowed number.
        below: Smallest number above the allowed ones.

    Returns:
        A field of a dataclass.
    """
    metadata = {"help": help, "flag": flag, "choices": choices, "group": group, "once": once}
    range = {"least": least, "most": most, "below": below}
    return field(default=default, metadata={**metadata, **range})


def check_ranges(config: Any) -> None:
    """Check the numbers among the settings of a dataclass.

    Raises:
        UserError: For the first one that is out of the range of its `option`, or not finite.
    """
    for setting in fields(config):
        value, meta = getattr(config, setting.name), setting.metadata
        least, most, below = meta.get("least"), meta.get("most"), meta.get("below")
        if least is None:
            continue
        outside = value < least or (most is not None and value > most)
        if outside or not math.isfinite(value) or (below is not None and value >= below):
            end = f" and at most {most}" if most is not None else ""
            end = f" and below {below}" if below is not None else end
            raise UserError(
                f"{option_name(setting.name)} must be at least {least}{end}, got {value}."
            )


def option_name(setting: str) -> str:
    """The option of a setting: ``--batch-size`` for ``batch_size``."""
    return "--" + setting.replace("_", "-")


def add_options(command: argparse.ArgumentParser, config: type) -> None:
    """Add one option for each setting of the dataclass ``config``."""
    place: argparse._ActionsContainer = command
    for setting in fields(config):
        if title := setting.metadata.get("group"):
            place = command.add_argument_group(title)
        if setting.metadata:
            _add_option(place, setting)


def given_options(args: argparse.Namespace, config: type) -> dict:
    """The settings of ``config`` that were given on the command line, by name."""
    return {f.name: getattr(args, f.name) for f in fields(config) if hasattr(args, f.name)}


def command_arguments(values: dict, config: type) -> list[str]:
    """Command-line arguments for settings of ``config``: the inverse of `given_options`."""
    line = []
    for setting in fields(config):
        if setting.metadata and values.get(setting.name) is not None:
            line += _arguments(setting, values[setting.name])
    return line


def read_settings(file: str | Path, config: type) -> dict:
    """Read settings from a YAML file.

    Args:
        file: A mapping of option names, with ``_`` or ``-``, to values. A key without a value is
            ignored.
        config: The dataclass whose fields are the allowed keys.

    Returns:
        The settings by name.

    Raises:
        UserError: If the file cannot be read, a key is unknown or given twice, or a value has the
            wrong type.
    """
    return checked_settings(_read_mapping(Path(file)), config, f"--config {file}")


def checked_settings(content: dict, config: type, place: str) -> dict:
    """Settings of a file by name, as the command line would give them.

    Raises:
        UserError: If a key is unknown, or a value has the wrong type. It starts with ``place``.
    """
    known = {setting.name: setting for setting in fields(config)}
    given = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{place}: unknown setting {key}.{hint}")
        if value is not None:
            given[name] = _checked(known[name], value, f"{place}: {key}")
    return given


def pair(text: str) -> tuple[str, object]:
    """Parse KEY=VALUE. The value is a Python literal, otherwise text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _add_option(place: argparse._ActionsContainer, setting: Field) -> None:
    """Add one option. An option that is not given stays out of the namespace."""
    meta, kind, default = setting.metadata, type(setting.default), setting.default
    help, choices = meta["help"], meta.get("choices")
    how: dict[str, Any]
    if meta.get("pairs"):
        how = {"nargs": "+", "type": pair, "metavar": "KEY=VALUE", "action": Pairs}
        default = None
    elif meta.get("several"):
        how, default = {"nargs": "+", "choices": choices, "action": "extend"}, None
    elif meta.get("numbers"):
        how = {"nargs": "+", "type": float, "metavar": "NUMBER", "action": "extend"}
        default = None
    elif meta.get("flag"):
        how = {"action": argparse.BooleanOptionalAction}
        default = {True: "on", False: "off"}.get(default)
    else:
        metavar = None if choices else kind.__name__.upper()
        how = {"type": kind, "choices": choices, "metavar": metavar}
        how |= {"action": Once} if meta.get("once") else {}
    if (default or kind is float) and "(default: " not in help:
        help = f"{help} (default: {default})"
    place.add_argument(option_name(setting.name), help=help, default=argparse.SUPPRESS, **how)


def _arguments(setting: Field, value: Any) -> list[str]:
    flag = option_name(setting.name)
    if setting.metadata.get("pairs"):
        return [flag, *(f"{key}={_literal(each)}" for key, each in value.items())] if value else []
    if setting.metadata.get("flag"):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if value == "" and setting.metadata.get("choices"):
        return []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _literal(value: object) -> str:
    """The text that `pair` reads as ``value``."""
    plain = str(value)
    return plain if isinstance(value, str) and pair(f"k={plain}")[1] == value else repr(value)


def _read_mapping(file: Path) -> dict:
    try:
        content = load_yaml(file)
    except OSError as error:
        raise UserError(f"--config: cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(
            f"--config: {file} is not valid YAML: {sentence(error)} Correct the file."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {file} must contain lines such as lr: 0.001.")
    return content


def _checked(setting: Field, value: Any, where: str) -> Any:
    """``value`` as the command line would give it.

    Raises:
        UserError: If it has another type. The message starts with ``where``.
    """
    meta, kind, given = setting.metadata, type(setting.default), value
    choices = meta.get("choices")
    if meta.get("pairs"):
        valid, expected = isinstance(value, dict), "a mapping"
    elif meta.get("several"):
        value = [value] if isinstance(value, str) else value
        valid = isinstance(value, list) and all(word in choices for word in value)
        expected = f"a list of {', '.join(choices)}"
    elif meta.get("numbers"):
        given_list = value if isinstance(value, list) else [value]
        value = [_number(float, each) for each in given_list]
        valid, expected = None not in value, "a number or a list of numbers"
    elif meta.get("flag"):
        valid, expected = isinstance(value, bool), "true or false"
    elif kind is str:
        valid = isinstance(value, str | int | float) and not isinstance(value, bool)
        value, expected = str(value), "text"
        if choices:
            valid = value in choices or value == setting.default
            expected = f"one of {', '.join(choices)}"
    else:
        value = _number(kind, value)
        valid, expected = value is not None, "a whole number" if kind is int else "a number"
    if not valid:
        raise UserError(f"{where} must be {expected}, got {reprlib.repr(given)}.")
    return value


def _number(kind: type, value: Any) -> int | float | None:
    """A number of type ``kind``, otherwise None. Accepts text too: YAML reads 5e-4 as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = kind(value)
    except ValueError:
        return None
    return number if isinstance(value, str) or number == value else None
