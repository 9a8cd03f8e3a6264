"""``ema-timm recipes``."""

import argparse
import sys


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "recipes",
        help="settings for train.py: the paper's experiments and a fine-tuning run",
        description="Without NAME, list the recipes; with it, print one. What is printed is YAML "
        "for timm's train.py, or for the paper's detectors a model YAML of YOLOv5, written from "
        "the clone in which the command runs.",
        epilog="example: ema-timm recipes finetune_warm_start > finetune.yaml; "
        "train.py -c finetune.yaml --data-dir flowers",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print")
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
