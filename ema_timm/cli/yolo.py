"""``ema-timm yolo``."""

import argparse

from ema_timm.errors import UserError
from ema_timm.integrations.yolo.rows import PLACES


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "yolo",
        help="put EMA attention into a YOLO or RT-DETR of ultralytics; make a folder of one",
        description="--output: put EMA attention into a detector of ultralytics without changing "
        "what it computes, and write it as a checkpoint with its model YAML beside it. Every "
        "tensor is carried over, and training starts from there. From a model YAML, a YAML is "
        "written. --folder: write a detector as a folder without a pickle, which ema-timm publish "
        "takes. --data: measure a folder by ultralytics' own validation, for its card.",
        epilog="example: ema-timm yolo yolo11n.pt --output yolo11n-ema.pt; "
        "yolo train model=yolo11n-ema.pt data=coco8.yaml; "
        "ema-timm yolo best.pt --folder detector --data coco8.yaml",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a checkpoint .pt, or a model .yaml, of ultralytics; for --data a folder, too",
    )
    command.add_argument("--output", metavar="FILE", help=".pt, or .yaml for the model YAML alone")
    command.add_argument(
        "--after",
        nargs="+",
        metavar="PLACE",
        help=f"behind which rows: {', '.join(PLACES)}, or numbers of rows (default: head, the rows "
        "that feed it)",
    )
    command.add_argument(
        "--groups", type=int, help="upper bound for the number of channel groups (default: 32)"
    )
    command.add_argument("--folder", metavar="DIR", help="the folder to write, without a pickle")
    command.add_argument("--data", help="the data set to measure on, as ultralytics names it")
    command.add_argument("--imgsz", type=int, help="size of its images (default: the detector's)")
    command.add_argument("--split", help="val, test or train (default: val)")
    command.add_argument("--device", help="cpu, 0, ... (default: ultralytics chooses)")
    command.set_defaults(run=_yolo)


def _yolo(args: argparse.Namespace) -> int:
    modes = {"output": ("after", "groups"), "data": ("imgsz", "split", "device")}
    for mode, options in modes.items():
        for name in options:
            if getattr(args, name) is not None and not getattr(args, mode):
                raise UserError(f"--{name} goes with --{mode}.")
    if args.output and (args.folder or args.data):
        raise UserError("--output goes without --folder and --data. Run the command twice.")
    if args.output:
        return _inject(args)
    if args.folder or args.data:
        return _folder(args)
    raise UserError("say what to do with it: --output FILE, --folder DIR or --data DATA.yaml.")


def _inject(args: argparse.Namespace) -> int:
    from ema_timm.attention import DEFAULT_GROUPS
    from ema_timm.integrations.yolo.files import inject_file

    places = args.after or ["head"]
    numbers = all(place.isdecimal() for place in places)
    after = [int(place) for place in places] if numbers else " ".join(places)
    groups = DEFAULT_GROUPS if args.groups is None else args.groups
    done, files = inject_file(args.source, args.output, after, groups)
    print(done)
    for file in files:
        print(file)
    return 0


def _folder(args: argparse.Namespace) -> int:
    from ema_timm.checkpoints.cards.file import EditedCardError
    from ema_timm.integrations.yolo.measure import make_folder, measured_lines

    try:
        folder, results = make_folder(
            args.source, args.folder, args.data, args.imgsz, args.split or "val", args.device
        )
    except EditedCardError as error:
        print(error.diff)
        raise
    for line in measured_lines(results):
        print(line)
    print(folder)
    return 0
