"""``ema-timm finetune``, ``ema-timm compare`` and ``ema-timm quickstart``."""

import argparse
import os

from ema_timm.compare.settings import ATTENTION, CompareConfig, make_comparison
from ema_timm.errors import UserError
from ema_timm.options import add_options, given_options, option_name, read_settings
from ema_timm.training.settings import FinetuneConfig


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_finetune(commands)
    _add_compare(commands)
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
    add_options(command, FinetuneConfig)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run in --output, with its settings; a finished one "
        "with more --epochs, as a new run from its last weights",
    )
    _add_config(command)
    command.set_defaults(run=_finetune)


def _add_config(command) -> None:
    command.add_argument(
        "-c",
        "--config",
        metavar="FILE.yaml",
        default=argparse.SUPPRESS,
        help="settings from a YAML file; those on the command line win over it",
    )


def _given(args: argparse.Namespace) -> dict:
    """The settings of finetune that were given in the file or on the command line."""
    file = read_settings(args.config, FinetuneConfig) if hasattr(args, "config") else {}
    return {**file, **given_options(args, FinetuneConfig)}


def _finetune(args: argparse.Namespace) -> int:
    given = _given(args)
    _check_given(given, ["output"] if args.resume else ["model", "data_dir", "output"])

    from ema_timm.training.run import continue_run, finetune

    results = continue_run(given) if args.resume else finetune(FinetuneConfig(**given))
    metrics = results["metrics"]
    if os.environ.get("RANK", "0") == "0":  # only one process prints
        print(f"{given['output']}: top-1 {metrics['top1']:.2f}% of {metrics['images']} images")
    return 0


def _check_given(given: dict, required: list[str]) -> None:
    missing = [option_name(name) for name in required if not given.get(name)]
    if missing:
        raise UserError(f"finetune needs {', '.join(missing)}; see ema-timm finetune --help.")


def _add_compare(commands) -> None:
    command = commands.add_parser(
        "compare",
        help="train one network with several attention layers, several seeds each",
        description="Put each attention layer into the same slots of the same network, train all "
        "with the same settings, seeds and images, and make a table of accuracy and cost. What is "
        "done is skipped, what was begun continues. All options of finetune are taken.",
        epilog="example: ema-timm compare --model resnet50 --attention none se eca cbam coord ema "
        "--data-dir flowers --seeds 5 --output runs/compare; to go on, or to make the table: "
        "ema-timm compare --output runs/compare",
    )
    command.add_argument(
        "--attention",
        nargs="+",
        metavar="LAYER",
        help="none, ema, ema-no-cross-spatial and names of timm's create_attn; arguments follow "
        f"an @, as in ema@groups=8 (default: {' '.join(ATTENTION)})",
    )
    command.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="devices to run on side by side"
    )
    add_options(command, CompareConfig)
    kind = command.add_mutually_exclusive_group()
    kind.add_argument(
        "--list", action="store_true", help="train nothing: print a finetune command for each run"
    )
    kind.add_argument(
        "--collect", action="store_true", help="train nothing: make the table of what is there"
    )
    add_options(command, FinetuneConfig)
    _add_config(command)
    command.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    own = given_options(args, CompareConfig)
    comparison = make_comparison(_given(args), args.attention, own.get("seeds"))

    from ema_timm.compare.comparison import compare, list_commands
    from ema_timm.compare.report import markdown

    if args.list:
        print(*list_commands(comparison), sep="\n")
        return 0
    devices, config = args.devices or [None], CompareConfig(**own)
    table = compare(comparison, devices, config, train=not args.collect)
    print(markdown(table))
    return 1 if any(row["why_not"] for row in table["rows"]) and not args.collect else 0


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
    from ema_timm.training.quickstart import quickstart

    print(quickstart(args.output))
    return 0
