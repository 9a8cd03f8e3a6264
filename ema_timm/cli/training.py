"""``ema-timm finetune``, ``ema-timm compare`` and ``ema-timm quickstart``."""

import argparse
import os

from ema_timm.compare.settings import ATTENTION, CompareConfig, make_comparison
from ema_timm.errors import UserError
from ema_timm.options import add_options, given_options, option_name, read_settings
from ema_timm.repeated import Once
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
        "in timm's Hub format. Run it under torchrun to use several GPUs.",
        epilog="examples:\n"
        "  ema-timm finetune --model resnet50_ema --data-dir flowers --output runs/flowers\n"
        "  ema-timm finetune --resume --output runs/flowers",
    )
    add_options(command, FinetuneConfig)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, train a finished one for more --epochs, or start one "
        "if there is none",
    )
    _add_config(command)
    command.set_defaults(run=_finetune)


def _add_config(command) -> None:
    command.add_argument(
        "-c",
        "--config",
        metavar="FILE.yaml",
        action=Once,
        default=argparse.SUPPRESS,
        help="read settings from a YAML file; the command line overrides it",
    )


def _given(args: argparse.Namespace) -> dict:
    """The settings of finetune that were given in the file or on the command line."""
    file = read_settings(args.config, FinetuneConfig) if hasattr(args, "config") else {}
    return {**file, **given_options(args, FinetuneConfig)}


def _finetune(args: argparse.Namespace) -> int:
    given = _given(args)
    images = "dataset" if given.get("dataset") else "data_dir"
    # With --resume, the settings of a start also start a run, and continue only a run of these.
    by_output = args.resume and not (given.get("model") and given.get(images))
    _check_given(given, ["output"] if by_output else ["model", images, "output"])

    from ema_timm.training.run import continue_run, finetune

    if by_output:
        results = continue_run(given)
    else:
        results = finetune(FinetuneConfig(**given), resume=args.resume)
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
        help="train one network with several attention layers and seeds",
        description="Train the same network with different attention layers in the same places, "
        "with the same settings, seeds and images, and write a table of accuracy and cost. "
        "Finished runs are skipped and interrupted runs resume. All options of finetune apply "
        "but --resume; --model is a plain timm network, --output the folder of all "
        "runs, and --model-kwargs go to every network.",
        epilog="examples:\n"
        "  ema-timm compare --model resnet50 --attention none se ema --data-dir flowers \\\n"
        "      --seeds 5 --output runs/compare\n"
        "  ema-timm compare --output runs/compare  # continue",
    )
    command.add_argument(
        "--attention",
        nargs="+",
        action="extend",
        metavar="LAYER",
        help="none, ema, ema-no-cross-spatial or names of timm's create_attn; add arguments after "
        f"an @, as in ema@groups=8 (default: {' '.join(ATTENTION)})",
    )
    command.add_argument(
        "--devices",
        nargs="+",
        action="extend",
        metavar="DEVICE",
        help="run on these devices in parallel, such as cuda:0 cuda:1",
    )
    add_options(command, CompareConfig)
    kind = command.add_mutually_exclusive_group()
    kind.add_argument(
        "--list", action="store_true", help="only print a finetune command for each run"
    )
    kind.add_argument(
        "--collect", action="store_true", help="only make the table of the finished runs"
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
        help="train a small EMA model on handwritten digits, offline",
        description="Train a small EMA model on scikit-learn's handwritten digits, offline, in "
        "about a minute. Reload it by name in a new process and check that the accuracy is the "
        "same.",
    )
    command.add_argument(
        "--output", default="runs/quickstart", help="folder to write (default: %(default)s)"
    )
    command.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    from ema_timm.training.quickstart import quickstart

    print(quickstart(args.output))
    return 0
