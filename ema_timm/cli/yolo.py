"""``ema-timm yolo``."""

import argparse

PLACES = ("head", "backbone", "neck", "all")


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "yolo",
        help="put EMA attention into a YOLO or RT-DETR of ultralytics",
        description="Put EMA attention into a detector of ultralytics without changing what it "
        "computes, and write it as a checkpoint with its model YAML beside it. Every tensor is "
        "carried over, and training starts from there. From a model YAML, a YAML is written.",
        epilog="example: ema-timm yolo yolo11n.pt --output yolo11n-ema.pt; "
        "yolo train model=yolo11n-ema.pt data=coco8.yaml",
    )
    command.add_argument(
        "source", metavar="SOURCE", help="a checkpoint .pt, or a model .yaml, of ultralytics"
    )
    command.add_argument(
        "--after",
        nargs="+",
        default=["head"],
        metavar="PLACE",
        help=f"behind which rows: {', '.join(PLACES)}, or numbers of rows (default: head, the rows "
        "that feed it)",
    )
    command.add_argument(
        "--groups",
        type=int,
        default=32,
        help="upper bound for the number of channel groups (default: %(default)s)",
    )
    command.add_argument(
        "--output", required=True, metavar="FILE", help=".pt, or .yaml for the model YAML alone"
    )
    command.set_defaults(run=_yolo)


def _yolo(args: argparse.Namespace) -> int:
    from ema_timm.integrations.yolo.files import inject_file

    numbers = all(place.isdecimal() for place in args.after)
    after = [int(place) for place in args.after] if numbers else " ".join(args.after)
    done, files = inject_file(args.source, args.output, after, args.groups)
    print(done)
    for file in files:
        print(file)
    return 0
