"""Settings of a dataclass as options of a command. Nothing here imports torch."""

import argparse
import ast

from ema_timm.finetune_config import option_fields


def add_options(command: argparse.ArgumentParser, config: type) -> None:
    """One option for each setting of ``config``."""
    for field in option_fields(config):
        if field.metadata:
            _add_option(command, field)


def given_options(args: argparse.Namespace, config: type) -> dict:
    """The settings that were given on the command line, by name."""
    given = {f.name: getattr(args, f.name) for f in option_fields(config) if hasattr(args, f.name)}
    if "model_kwargs" in given:
        given["model_kwargs"] = dict(given["model_kwargs"])
    return given


def _add_option(command: argparse.ArgumentParser, field) -> None:
    """One option for one setting; what is not given stays out of the namespace."""
    flag = "--" + field.name.replace("_", "-")
    help = field.metadata["help"]
    shown = {"default": argparse.SUPPRESS}
    if field.metadata.get("pairs"):
        command.add_argument(flag, nargs="+", type=pair, metavar="KEY=VALUE", help=help, **shown)
    elif field.metadata.get("flag"):
        command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help, **shown)
    else:
        kind = type(field.default)
        if field.default or kind is float:
            help = f"{help} (default: {field.default})"
        choices = field.metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        command.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help, **shown)


def pair(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value as Python reads it, or as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
