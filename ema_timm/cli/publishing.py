"""``ema-timm publish`` and ``ema-timm export``."""

import argparse
import os

from ema_timm.errors import UserError
from ema_timm.repeated import Once

LONGEST = 1_000_000
"""Most seconds of --time-limit; the timers of some systems hold no more."""


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_publish(commands)
    _add_export(commands)


def _add_publish(commands) -> None:
    command = commands.add_parser(
        "publish",
        help="upload a checkpoint folder to the Hugging Face Hub",
        description="Upload a checkpoint folder to the Hugging Face Hub in one commit: weights "
        "(never a pickle), config.json, model card, results and figures. The command loads the "
        "model before and after the upload. Publishing the same folder again makes no new commit.",
        epilog="example:\n"
        "  ema-timm publish runs/flowers --repo-id USER/flowers --dry-run\n"
        "Log in with hf auth login, or set HF_TOKEN. Uploads do not use xet unless you set "
        "HF_HUB_DISABLE_XET=0; --time-limit cannot interrupt them then.",
    )
    command.add_argument(
        "folder",
        metavar="FOLDER",
        help="checkpoint folder, or one that ema-timm yolo --folder wrote",
    )
    command.add_argument(
        "--repo-id", required=True, metavar="USER/NAME", help="repository to upload to"
    )
    command.add_argument(
        "--private", action="store_true", help="make the repository private if it is new"
    )
    command.add_argument(
        "--revision", default="main", help="branch to commit to (default: %(default)s)"
    )
    command.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of a commit"
    )
    command.add_argument(
        "--force", action="store_true", help="replace a card that was edited on the Hub"
    )
    command.add_argument(
        "--time-limit",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="stop all network operations after this time (default: %(default).0f)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check the folder and list the files, offline"
    )
    command.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    # The client reads this when it is imported. The time limit can interrupt only uploads
    # without xet.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from ema_timm.checkpoints.cards.file import EditedCardError
    from ema_timm.hub.commit import Destination
    from ema_timm.publishing.kinds import kind_of
    from ema_timm.publishing.upload import publish, rehearse

    if not 0 < args.time_limit <= LONGEST:
        raise UserError(
            f"--time-limit must be above 0 and at most {LONGEST:,} seconds, "
            f"got {args.time_limit:g}."
        )
    to = Destination(args.repo_id, args.revision, args.private, args.create_pr)
    if args.dry_run:
        print(f"would publish to {rehearse(args.folder, to)}")
        return 0
    try:
        landed = publish(args.folder, to, force=args.force, time_limit=args.time_limit)
    except EditedCardError as error:
        print(error.diff)
        raise
    load_line = kind_of(args.folder).load_line
    print(f"{landed.url}\n{load_line.format(repo=args.repo_id, commit=landed.commit)}")
    return 0


def _add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="write a model as an ONNX, TorchScript, torch.export or ncnn file",
        description="Write the network of a checkpoint folder as a file into that folder. Batch, "
        "height and width stay free unless --batch-size or --img-size fixes them; ncnn files are "
        "for one image of one size, the network's own without --img-size. The file "
        "is opened again and compared with the network on three inputs before it gets its name.",
        epilog="example: ema-timm export runs/flowers --format onnx --img-size 224",
    )
    command.add_argument("folder", metavar="FOLDER", help="a checkpoint in timm's format")
    command.add_argument(
        "--format",
        required=True,
        choices=("onnx", "torchscript", "pt2", "ncnn"),
        help="file format; pt2 is torch.export",
    )
    command.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        action=Once,
        metavar="PIXELS",
        help="fix the image size (one number, or height and width): fewer and faster operators",
    )
    command.add_argument("--batch-size", type=int, metavar="IMAGES", help="fix the batch size")
    command.add_argument(
        "--reparam", action="store_true", help="fold the weights of other layers, as timm does"
    )
    command.add_argument(
        "--exporter",
        default="dynamo",
        choices=("dynamo", "legacy"),
        help="PyTorch's ONNX exporter; legacy exports faster (default: %(default)s)",
    )
    command.add_argument(
        "--int8", action="store_true", help="quantise the ONNX file, too, and report its agreement"
    )
    command.add_argument(
        "--fp16", action="store_true", help="store the weights of the ncnn file in half precision"
    )
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.format != "onnx" and (args.int8 or args.exporter != "dynamo"):
        raise UserError(
            f"--int8 and --exporter need --format onnx, got --format {args.format}. Leave them out."
        )
    if args.format != "ncnn" and args.fp16:
        raise UserError(f"--fp16 needs --format ncnn, got --format {args.format}. Leave it out.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}.")
    if args.int8 and args.batch_size not in (None, 1):
        raise UserError(
            f"--int8 compares one image at a time, got --batch-size {args.batch_size}. "
            "Leave it out, or give --batch-size 1."
        )
    from ema_timm.export import InputSize, export, quantize_int8

    fixed = InputSize(_image_size(args.img_size), args.batch_size)
    done = export(args.folder, args.format, args.reparam, args.exporter, fixed, args.fp16)
    sizes = ", ".join("x".join(map(str, size)) for size in done.sizes)
    print(f"{done.path}: agrees with the network at {sizes} to {done.difference:.1e}")
    if args.int8:
        small = quantize_int8(args.folder, fixed)
        print(
            f"{small.path}: differs by {small.difference:.1e}, same class for {small.same_class} "
            f"of {small.images} random images; measure its accuracy on your images"
        )
    return 0


def _image_size(pixels: list[int] | None) -> tuple[int, int] | None:
    """(H, W) of ``--img-size``, which is one number or two."""
    if pixels is None:
        return None
    if len(pixels) > 2 or min(pixels) < 1:
        raise UserError(
            f"--img-size must be one number of pixels or two, at least 1, got "
            f"{' '.join(map(str, pixels))}."
        )
    return pixels[0], pixels[-1]
