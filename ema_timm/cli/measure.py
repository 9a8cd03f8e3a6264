"""``ema-timm evaluate``."""

import argparse

from ema_timm.measure.settings import EvaluateConfig
from ema_timm.options import add_options, given_options


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "evaluate",
        help="measure the accuracy of a checkpoint on images",
        description="Measure a checkpoint folder, or a checkpoint file of timm's train.py. Write "
        "results.json and a confusion matrix into the folder. The counts equal those of timm's "
        "validate.py.",
        epilog="examples:\n"
        "  ema-timm evaluate runs/flowers --data-dir flowers\n"
        "  ema-timm evaluate model_best.pth.tar --data-dir flowers --output runs/flowers",
    )
    command.add_argument("source", metavar="CHECKPOINT", help="checkpoint folder or file")
    add_options(command, EvaluateConfig)
    command.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from ema_timm.measure import evaluate

    config = EvaluateConfig(**given_options(args, EvaluateConfig))
    metrics = evaluate(config)["metrics"]
    folder = config.output or config.source
    print(f"{folder}: top-1 {metrics['top1']:.2f}% of {metrics['images']} images")
    print(f"next: ema-timm card {folder}")
    return 0
