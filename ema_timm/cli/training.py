"""``ema-timm finetune`` and ``ema-timm quickstart``."""

import argparse
import ast
import os

from ema_timm.errors import UserError
from ema_timm.finetune_config import FinetuneConfig, option_fields


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_finetune(commands)
    _add_quickstart(commands)


def _add_finetune(commands) -> None:
    command = commands.add_parser(
        "finetune",
        help="fine-tune a timm model on an image folder",
        description="Fine-tune any timm model on an image folder and write a checkpoint folder "
        "in timm's Hub format. Also runs under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: ema-timm finetune --model resnet50_ema --data-dir flowers "
        "--output runs/flowers; after an interruption: "
        "ema-timm finetune --resume --output runs/flowers",
    )
    for field in option_fields():
        _add_option(command, field)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run in --output, with its settings",
    )
    command.set_defaults(run=_finetune)


def _add_option(command: argparse.ArgumentParser, field) -> None:
    """One option for one setting; what is not given stays out of the namespace."""
    flag = "--" + field.name.replace("_", "-")
    help = field.metadata["help"]
    shown = {"default": argparse.SUPPRESS}
    if field.metadata.get("pairs"):
        command.add_argument(flag, nargs="+", type=_pair, metavar="KEY=VALUE", help=help, **shown)
    elif field.metadata.get("flag"):
        command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help, **shown)
    else:
        kind = type(field.default)
        if field.default or kind is float:
            help = f"{help} (default: {field.default})"
        choices = field.metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        command.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help, **shown)


def _pair(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _finetune(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in option_fields() if hasattr(args, f.name)}
    if "model_kwargs" in given:
        given["model_kwargs"] = dict(given["model_kwargs"])
    required = ["output"] if args.resume else ["model", "data_dir", "output"]
    missing = [f"--{name.replace('_', '-')}" for name in required if not given.get(name)]
    if missing:
        raise UserError(f"finetune needs {', '.join(missing)}; see ema-timm finetune --help.")

    from ema_timm.finetune import finetune
    from ema_timm.run_folder import RunFolder

    if args.resume:
        folder = RunFolder(given["output"])
        folder.prepare(resume=True)
        given = {**folder.load_state()["config"], **given}
    results = finetune(FinetuneConfig(**given), resume=args.resume)
    metrics = results["metrics"]
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(f"{given['output']}: top-1 {metrics['top1']:.2f}% of {metrics['images']} images")
    return 0


def _add_quickstart(commands) -> None:
    command = commands.add_parser(
        "quickstart",
        help="train a small EMA model on handwritten digits, offline, in about a minute",
        description="Fine-tune a small EMA model on the handwritten digits of scikit-learn, "
        "reload it by name in a fresh process and check that it is the same. Needs no network.",
    )
    command.add_argument(
        "--output", default="runs/quickstart", help="folder to write (default: %(default)s)"
    )
    command.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    from ema_timm.quickstart import quickstart

    print(quickstart(args.output))
    return 0
