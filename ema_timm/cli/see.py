"""``ema-timm attend`` and ``ema-timm predict``."""

import argparse
import sys
from typing import TYPE_CHECKING

from ema_timm.names import printable
from ema_timm.options import add_options, given_options
from ema_timm.see.settings import AttendConfig, PredictConfig

if TYPE_CHECKING:
    from ema_timm.see.predictions import Prediction


def add_commands(commands) -> None:
    """Add the subcommands to the parser."""
    _add_attend(commands)
    _add_predict(commands)


_CHECKPOINT = "checkpoint folder, timm name or hf-hub:USER/NAME"


def _add_attend(commands) -> None:
    command = commands.add_parser(
        "attend",
        help="draw where EMA attention looks in images",
        description="Draw the attention map of each stage over the images, the gates along height "
        "and width at its edges, and Grad-CAM. Each image is a row, each stage a column. For a "
        "detector it prints the best detection and draws no Grad-CAM.",
        epilog="examples:\n  ema-timm attend runs/flowers rose.jpg tulip.jpg --output attend.png\n"
        "  ema-timm attend best.pt street.jpg",
    )
    command.add_argument(
        "source",
        metavar="CHECKPOINT",
        help=f"{_CHECKPOINT}, or a detector of ultralytics: a .pt or its folder",
    )
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    add_options(command, AttendConfig)
    command.set_defaults(run=_attend)


def _attend(args: argparse.Namespace) -> int:
    from ema_timm.see import attend

    done = attend(AttendConfig(**given_options(args, AttendConfig)))
    for row in done.rows:
        print(_line(row))
    for picture in done.pictures:
        print(f"{picture}: {', '.join(done.layers)}", file=sys.stderr)
    for line in done.skipped:
        print(line, file=sys.stderr)
    return 0


def _line(row: "Prediction") -> str:
    """An image and its classes, separated by tabs."""
    best = [f"{printable(name)} {p:.4f}" for name, p in zip(row.label, row.prob, strict=True)]
    return "\t".join([printable(row.filename), *best])


def _add_predict(commands) -> None:
    command = commands.add_parser(
        "predict",
        help="print labels and probabilities of images",
        description="Classify images with the preprocessing of a checkpoint, as timm's "
        "inference.py does. The command skips unreadable images with a message, and the exit code "
        "is then 1.",
        epilog="example:\n"
        "  ema-timm predict runs/flowers photos --output predictions.csv --sheet sheet.png",
    )
    command.add_argument(
        "source",
        metavar="CHECKPOINT",
        help=f"{_CHECKPOINT}, or an .onnx file of ema-timm export",
    )
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files and folders")
    add_options(command, PredictConfig)
    command.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    from ema_timm.see import predict

    config = PredictConfig(**given_options(args, PredictConfig))
    done = predict(config)
    if not config.output:
        for row in done.rows:
            print(_line(row))
    else:
        print(f"{config.output}: {len(done.rows)} images")
    if done.omitted:
        print(f"{config.sheet}: does not show the last {done.omitted} images", file=sys.stderr)
    for line in [*done.skipped, *done.unreadable]:
        print(line, file=sys.stderr)
    return 1 if done.unreadable else 0
