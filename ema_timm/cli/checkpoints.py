"""``ema-timm convert`` and ``ema-timm card``."""

import argparse
import sys

from ema_timm.options import pair


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_convert(commands)
    _add_card(commands)


_FIELDS = (
    ("license", "ID", "licence of the weights, by the Hub's names: apache-2.0, mit, other, ..."),
    ("license_name", "NAME", "its name, where --license is other"),
    ("license_link", "URL", "where its text is, where --license is other"),
    ("datasets", "ID", "data set on the Hub that it was trained on; may be given several times"),
    ("base_model", "USER/NAME", "repository of the weights that training started from"),
    ("repo_id", "USER/NAME", "repository that the folder is for, named in the examples"),
)
"""Fields of the card that cannot be measured."""


def _add_convert(commands) -> None:
    command = commands.add_parser(
        "convert",
        help="turn the authors' or others' EMA checkpoints into a folder",
        description="Map a checkpoint of a network with EMA attention, such as the authors', onto "
        "timm's names and write a checkpoint folder. Groups and stages are read off the weights.",
        epilog="example: ema-timm convert model_best.pth.tar --model mobilenetv2_100_ema --output "
        "runs/authors; then: ema-timm evaluate runs/authors --data-dir DIR",
    )
    command.add_argument("source", metavar="CHECKPOINT", help="checkpoint file")
    command.add_argument("--output", required=True, help="checkpoint folder to write")
    command.add_argument("--model", default="", help="timm model name, with or without _ema")
    command.add_argument(
        "--rename",
        nargs="+",
        type=pair,
        default=[],
        metavar="OLD=NEW",
        help="new names of modules, such as model.7=layer3.5.se",
    )
    command.add_argument("--labels", default="", help="class names, as in ema-timm evaluate")
    command.add_argument("--use-averaged", action="store_true", help="take averaged weights")
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.write import write_converted

    rename = {old: str(new) for old, new in args.rename}
    done = write_converted(
        args.source, args.output, args.model, rename, args.labels, args.use_averaged
    )
    groups = ", ".join(map(str, sorted(set(done.groups.values()))))
    print(f"{args.output}: {done.architecture}, {len(done.groups)} EMA layers, groups: {groups}")
    for name in done.unused:
        print(f"not used: {name}", file=sys.stderr)
    return 0


def _add_card(commands) -> None:
    command = commands.add_parser(
        "card",
        help="write a folder's README.md from its results",
        description="Write the README.md of a checkpoint folder from results.json. What is "
        "measured comes from there; what nobody can measure is told by options, once.",
    )
    command.add_argument("folder", metavar="FOLDER", help="a checkpoint folder")
    for name, metavar, help in _FIELDS:
        action = "append" if name == "datasets" else "store"
        flag = "--dataset" if name == "datasets" else "--" + name.replace("_", "-")
        command.add_argument(flag, dest=name, metavar=metavar, help=help, action=action)
    command.add_argument("--force", action="store_true", help="replace a card edited by hand")
    command.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.cards.file import EditedCardError
    from ema_timm.publishing.kinds import kind_of

    fields = {name: value for name, *_ in _FIELDS if (value := getattr(args, name))}
    try:
        written = kind_of(args.folder).write_card(args.folder, fields, args.force)
    except EditedCardError as error:
        print(error.diff)
        raise
    for name in written.unknown:
        option = "--" + name.removesuffix("s")
        print(f"{name}: unknown and left out; tell it with {option}", file=sys.stderr)
    print(f"{args.folder}/README.md: {'written' if written.changed else 'unchanged'}")
    return 0
