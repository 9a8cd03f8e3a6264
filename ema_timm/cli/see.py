"""``ema-timm predict``."""

import argparse
import sys

from ema_timm.options import add_options, given_options
from ema_timm.see.settings import PredictConfig


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    _add_predict(commands)


_CHECKPOINT = "a checkpoint folder, a timm name or hf-hub:USER/NAME"


def _add_predict(commands) -> None:
    command = commands.add_parser(
        "predict",
        help="labels and probabilities of images",
        description="Classify images with the preprocessing of a checkpoint, as timm's "
        "inference.py does. Unreadable images are reported and skipped, and the exit code is 1.",
        epilog="example: ema-timm predict runs/flowers photos --output predictions.csv "
        "--sheet sheet.png",
    )
    command.add_argument(
        "source", metavar="CHECKPOINT", help=f"{_CHECKPOINT}, or an .onnx file in such a folder"
    )
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files and folders")
    add_options(command, PredictConfig)
    command.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    from ema_timm.see.predict import predict

    config = PredictConfig(**given_options(args, PredictConfig))
    done = predict(config)
    if not config.output:
        for row in done.rows:
            best = [f"{name} {p:.4f}" for name, p in zip(row.label, row.prob, strict=True)]
            print("\t".join([row.filename, *best]))
    else:
        print(f"{config.output}: {len(done.rows)} images")
    if done.left_off:
        print(f"{config.sheet}: without the last {done.left_off} images", file=sys.stderr)
    for line in done.unreadable:
        print(line, file=sys.stderr)
    return 1 if done.unreadable else 0
