"""``ema-timm publish``: a checkpoint folder given to others."""

import argparse
import os


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "publish",
        help="put a checkpoint folder on the Hugging Face Hub, verified",
        description="Put a checkpoint folder on the Hugging Face Hub in one commit: weights "
        "(never a pickle), config.json, card, results and pictures. It is loaded back before and "
        "after. Publishing the same folder twice makes no second commit.",
        epilog="The token is that of hf auth login, or HF_TOKEN. Uploads do not go through xet; "
        "HF_HUB_DISABLE_XET=0 lets the client use xet, on which --time-limit has no hold.",
    )
    command.add_argument("folder", metavar="FOLDER", help="a checkpoint folder")
    command.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the repository")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", default="main", help="branch (default: %(default)s)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument(
        "--force", action="store_true", help="replace a card on the Hub that was edited by hand"
    )
    command.add_argument(
        "--time-limit",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="for everything on the network (default: %(default).0f)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check, print what would be sent; no network"
    )
    command.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    # Read when the client is imported. Without xet every step is under the time limit.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from ema_timm.hub.card_file import EditedCardError
    from ema_timm.hub.publish import Destination, publish, rehearse

    to = Destination(args.repo_id, args.revision, args.private, args.create_pr)
    if args.dry_run:
        print(f"would publish to {rehearse(args.folder, to)}")
        return 0
    try:
        landed = publish(args.folder, to, force=args.force, time_limit=args.time_limit)
    except EditedCardError as error:
        print(error.diff)
        raise
    print(f"{landed.url}\n{landed.load_line(args.repo_id)}")
    return 0
