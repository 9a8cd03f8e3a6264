"""Settings of a dataclass as options of a command. Nothing here imports torch."""

import argparse
import ast
from dataclasses import field, fields
from typing import Any


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
