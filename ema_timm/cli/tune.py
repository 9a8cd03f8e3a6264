"""``ema-timm tune``."""

import argparse
import json
from pathlib import Path


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "tune",
        help="choose who computes EMA attention on this GPU, by measuring it here",
        description="Compare each implementation with the float64 definition at every layer's "
        "shape, time those that agree, and remember the fastest: impl='auto' looks it up on this "
        "GPU from then on.",
        epilog="example: ema-timm tune resnet50_ema --batch 256 --amp --channels-last",
    )
    command.add_argument("model", metavar="MODEL", help="timm name or checkpoint folder")
    command.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    command.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    command.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")
    command.add_argument("--channels-last", action="store_true", help="memory format")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    command.add_argument("--inference", action="store_true", help="without the backward")
    command.add_argument(
        "--retry", action="store_true", help="forget earlier choices, and what ended a process"
    )
    command.add_argument("--json", metavar="FILE", help="write the choices here too")
    command.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from ema_timm.environment import pick_device
    from ema_timm.tuning.tuner import tune_by_name

    tuned = tune_by_name(
        args.model,
        size=args.size,
        batch=args.batch,
        amp=args.amp,
        channels_last=args.channels_last,
        device=pick_device(args.device),
        training=not args.inference,
        retry=args.retry,
    )
    if args.json:
        Path(args.json).write_text(json.dumps(tuned.as_json(), indent=1) + "\n")
    print(tuned)
    return 0 if all(outcome.chosen for outcome in tuned.outcomes) else 1
