"""``ema-timm recipes``."""

import argparse
import sys


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "recipes",
        help="print settings for timm's train.py, such as those of the paper",
        description="Print a recipe, or without NAME the list of recipes. A recipe is a YAML file "
        "for timm's train.py. For the paper's detectors it is a model YAML of YOLOv5; run the "
        "command in a clone of YOLOv5 then.",
        epilog="example:\n"
        "  ema-timm recipes finetune_warm_start > finetune.yaml\n"
        "  python train.py -c finetune.yaml --data-dir flowers",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="recipe to print")
    command.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> int:
    from ema_timm.integrations.yolo import paper
    from ema_timm.recipes import read, recipes

    if args.name:
        sys.stdout.write((paper.read if args.name in paper.recipes() else read)(args.name))
        return 0
    known = {**recipes(), **paper.recipes()}
    width = max(map(len, known))
    for name, purpose in known.items():
        print(f"{name:{width}}  {purpose}")
    return 0
