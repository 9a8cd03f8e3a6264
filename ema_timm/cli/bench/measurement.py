"""What every measurement takes on the command line, and what becomes of its result."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def add_shared_options(kind: argparse.ArgumentParser) -> None:
    """Where to measure, and where to write what was found."""
    kind.add_argument("--batch", type=int, help="images (default: 8; 1 with --resolution)")
    kind.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    kind.add_argument("--channels-last", action="store_true", help="memory format")
    kind.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add_output_options(kind)


def add_output_options(kind: argparse.ArgumentParser) -> None:
    """Where to write what was found."""
    kind.add_argument("--json", metavar="FILE", help="write the measurement here")
    kind.add_argument("--plot", metavar="FILE.png", help="draw it here")


def report(args: argparse.Namespace, measure: Callable[[str], dict]) -> int:
    """Measure where it was asked for, and `show` the result."""
    import torch

    from ema_timm.measure.device import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    return show(args, measure(pick_device(args.device)))


def show(args: argparse.Namespace, result: dict, brief: bool = False) -> int:
    """Print the table, write what was asked for; 1 where a variant failed parity."""
    from ema_timm.bench.report.kinds import table
    from ema_timm.bench.report.picture import plot

    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result, brief))
    if args.plot:
        plot(result, args.plot)
    return 0 if all(row.get("parity", True) for row in result["rows"]) else 1
