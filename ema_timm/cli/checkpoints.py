"""``ema-timm convert`` and ``ema-timm card``."""

import argparse
import sys

from ema_timm.options import pair
from ema_timm.repeated import Pairs


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_convert(commands)
    _add_card(commands)


_METADATA = {
    "license": (
        "--license",
        "ID",
        "licence of the weights, as the Hub names it: apache-2.0, mit, other",
    ),
    "license_name": ("--license-name", "NAME", "name of the licence, if --license is other"),
    "license_link": ("--license-link", "URL", "link to the licence, if --license is other"),
    "datasets": (
        "--trained-on",
        "ID",
        "dataset on the Hub that the model was trained on; repeat the option for several",
    ),
    "base_model": ("--base-model", "USER/NAME", "repository of the initial weights"),
    "repo_id": ("--repo-id", "USER/NAME", "repository of the model, for the examples on the card"),
}
"""Options for the fields of the card that no measurement gives."""


def _add_convert(commands) -> None:
    command = commands.add_parser(
        "convert",
        help="convert a checkpoint of the authors' code into a folder",
        description="Convert a checkpoint of the authors' code, or of others with EMA attention, "
        "to timm's names and write a checkpoint folder. The command finds the groups and stages in "
        "the weights.",
        epilog="example:\n"
        "  ema-timm convert model_best.pth.tar --model mobilenetv2_100_ema --output runs/authors\n"
        "  ema-timm evaluate runs/authors --data-dir DIR",
    )
    command.add_argument("source", metavar="CHECKPOINT", help="checkpoint file")
    command.add_argument("--output", required=True, help="checkpoint folder to write")
    command.add_argument("--model", default="", help="timm model name (with or without _ema)")
    command.add_argument(
        "--rename",
        nargs="+",
        type=pair,
        action=Pairs,
        default={},
        metavar="OLD=NEW",
        help="rename modules, such as model.7=layer3.5.se",
    )
    command.add_argument("--labels", default="", help="file of class names, as in evaluate")
    command.add_argument(
        "--use-averaged",
        action=argparse.BooleanOptionalAction,
        help="use the averaged weights (default: if the file is of timm's --model-ema)",
    )
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.write import write_converted

    rename = {old: str(new) for old, new in args.rename.items()}
    done, notes = write_converted(
        args.source, args.output, args.model, rename, args.labels, args.use_averaged
    )
    groups = ", ".join(map(str, sorted(set(done.groups.values()))))
    print(f"{args.output}: {done.architecture}, {len(done.groups)} EMA layers, groups: {groups}")
    for note in (*notes, *(f"not used: {name}" for name in done.unused)):
        print(note, file=sys.stderr)
    return 0


def _add_card(commands) -> None:
    command = commands.add_parser(
        "card",
        help="write the model card of a checkpoint folder",
        description="Write README.md, the model card, from the measurements in results.json. "
        "The options give what cannot be measured. The folder remembers them.",
        epilog="example:\n  ema-timm card runs/flowers --license mit --repo-id USER/flowers",
    )
    command.add_argument("folder", metavar="FOLDER", help="checkpoint folder")
    for name, (flag, metavar, help) in _METADATA.items():
        action = "append" if name == "datasets" else "store"
        command.add_argument(flag, dest=name, metavar=metavar, help=help, action=action)
    command.add_argument("--force", action="store_true", help="replace a card that you edited")
    command.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.cards.file import EditedCardError
    from ema_timm.publishing.kinds import kind_of

    given = {name: value for name in _METADATA if (value := getattr(args, name))}
    try:
        written = kind_of(args.folder).write_card(args.folder, given, args.force)
    except EditedCardError as error:
        print(error.diff)
        raise
    for name in written.unknown:
        print(f"{name}: not set; use {_METADATA[name][0]}", file=sys.stderr)
    print(f"{args.folder}/README.md: {'written' if written.changed else 'unchanged'}")
    return 0
