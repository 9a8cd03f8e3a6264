"""``ema-timm tune``."""

import argparse
import json
from pathlib import Path


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "tune",
        help="choose the fastest implementation on your GPU (experimental)",
        description="Compare each implementation with the float64 reference at every layer's "
        "shape, time those that agree, and store the fastest: impl='auto' uses it on this GPU from "
        "then on. Experimental: not measured on a GPU yet.",
        epilog="example:\n  ema-timm tune resnet50_ema --batch-size 256 --amp --channels-last",
    )
    command.add_argument("model", metavar="MODEL", help="timm name or checkpoint folder")
    command.add_argument(
        "--img-size", type=int, default=224, help="image size in pixels (default: %(default)s)"
    )
    command.add_argument(
        "--batch-size", type=int, default=256, help="images in a batch (default: %(default)s)"
    )
    command.add_argument("--amp", action="store_true", help="use bfloat16 mixed precision")
    command.add_argument(
        "--channels-last", action="store_true", help="use channels-last memory format"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    command.add_argument("--inference", action="store_true", help="tune only for inference")
    command.add_argument(
        "--retry", action="store_true", help="ignore stored choices and records of crashes"
    )
    command.add_argument("--json", metavar="FILE", help="also write the choices to this file")
    command.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from ema_timm.environment import pick_device
    from ema_timm.tuning.tuner import tune_by_name

    result = tune_by_name(
        args.model,
        img_size=args.img_size,
        batch_size=args.batch_size,
        amp=args.amp,
        channels_last=args.channels_last,
        device=pick_device(args.device),
        training=not args.inference,
        retry=args.retry,
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result.as_json(), indent=1) + "\n")
    print(result)
    return 0 if all(choice.chosen for choice in result.choices) else 1
