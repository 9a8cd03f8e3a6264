"""``ema-timm yolo``."""

import argparse

from ema_timm.errors import UserError
from ema_timm.integrations.yolo.rows import PLACES


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "yolo",
        help="add EMA attention to a YOLO or RT-DETR of ultralytics",
        description="--output adds EMA attention to a detector of ultralytics, keeps its outputs "
        "and writes a checkpoint with its model YAML. From a model YAML it writes a YAML.\n"
        "--folder saves a detector as a folder without a pickle, for ema-timm publish.\n"
        "--data measures a folder with the validation of ultralytics, for the model card.",
        epilog="examples:\n"
        "  ema-timm yolo yolo11n.pt --output yolo11n-ema.pt\n"
        "  ema-timm yolo yolo11n.pt --inside C3k2 --output yolo11n-ema.pt\n"
        "  yolo train model=yolo11n-ema.pt data=coco8.yaml\n"
        "  ema-timm yolo best.pt --folder detector --data coco8.yaml",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="checkpoint .pt or model .yaml of ultralytics; with --data also a folder",
    )
    command.add_argument(
        "--output", metavar="FILE", help="write this .pt, or a .yaml to write only the model YAML"
    )
    command.add_argument(
        "--after",
        nargs="+",
        action="extend",
        metavar="PLACE",
        help=f"add layers after these rows: {', '.join(PLACES)}, or row numbers (default: head, "
        "which is the rows that feed the head)",
    )
    command.add_argument(
        "--inside",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="add layers inside the blocks of these classes, such as C3k2 or C2f: after each "
        "direct element of the block's m",
    )
    command.add_argument(
        "--groups", type=int, help="largest number of channel groups (default: 32)"
    )
    command.add_argument("--folder", metavar="DIR", help="write this folder, without a pickle")
    command.add_argument(
        "--data", metavar="DATA.yaml", help="measure on this dataset, as ultralytics names it"
    )
    command.add_argument(
        "--img-size", type=int, help="image size in pixels (default: the detector's)"
    )
    command.add_argument("--split", help="name of the split to measure on (default: val)")
    command.add_argument("--device", help="cpu, 0, ... (default: ultralytics chooses)")
    command.set_defaults(run=_yolo)


def _yolo(args: argparse.Namespace) -> int:
    modes = {"output": ("after", "inside", "groups"), "data": ("img_size", "split", "device")}
    for mode, options in modes.items():
        for name in options:
            if getattr(args, name) is not None and not getattr(args, mode):
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} needs --{mode}. Add --{mode}, or leave {option} out.")
    if args.output and (args.folder or args.data):
        raise UserError("--output excludes --folder and --data. Run the command twice.")
    if args.output:
        return _inject(args)
    if args.folder or args.data:
        return _folder(args)
    raise UserError("yolo needs --output FILE, --folder DIR or --data DATA.yaml.")


def _inject(args: argparse.Namespace) -> int:
    from ema_timm.attention import DEFAULT_GROUPS
    from ema_timm.integrations.yolo.files import inject_file

    after: str | list[int] | None = None
    if args.after:
        numbers = all(place.isdecimal() for place in args.after)
        after = [int(place) for place in args.after] if numbers else " ".join(args.after)
    groups = DEFAULT_GROUPS if args.groups is None else args.groups
    done, files = inject_file(args.source, args.output, after, groups, args.inside)
    print(done)
    for file in files:
        print(file)
    return 0


def _folder(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.cards.file import EditedCardError
    from ema_timm.integrations.yolo.measure import make_folder, measured_lines

    try:
        folder, results = make_folder(
            args.source, args.folder, args.data, args.img_size, args.split or "val", args.device
        )
    except EditedCardError as error:
        print(error.diff)
        raise
    for line in measured_lines(results):
        print(line)
    print(folder)
    return 0
