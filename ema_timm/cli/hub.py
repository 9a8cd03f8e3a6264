"""``ema-timm card``: what makes a checkpoint folder ready for others."""

import argparse


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_card(commands)


def _add_card(commands) -> None:
    command = commands.add_parser(
        "card",
        help="write a folder's README.md from its results",
        description="Write the README.md of a checkpoint folder from results.json. What is "
        "measured comes from there; what nobody can measure is told by options, once.",
    )
    command.add_argument("folder", metavar="FOLDER", help="a checkpoint folder")
    command.add_argument("--license", metavar="ID", help="licence of the weights, such as mit")
    command.add_argument("--force", action="store_true", help="replace a card edited by hand")
    command.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> int:
    from ema_timm.hub.card_file import EditedCardError, write_card

    told = {key: value for key in ("license",) if (value := getattr(args, key))}
    try:
        changed = write_card(args.folder, told, args.force)
    except EditedCardError as error:
        print(error.diff)
        raise
    print(f"{args.folder}/README.md: {'written' if changed else 'unchanged'}")
    return 0
