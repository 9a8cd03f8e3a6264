"""What every measurement takes on the command line, and what becomes of its result."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ema_timm.errors import InterruptedRunError
from ema_timm.files import write_whole


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

    from ema_timm.environment import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    return show(args, measure(pick_device(args.device)))


def measure_in_parts(args: argparse.Namespace, measure: Callable[..., dict]) -> dict:
    """``measure(keep=...)``, which calls ``keep(result)`` after each part: nothing of it is lost.

    Raises:
        InterruptedRunError: If it was stopped after the first part; what there is was shown.
    """
    found: list[dict] = []

    def keep(result: dict) -> None:
        found[:] = [result]
        if args.json:
            _write(args.json, result)

    try:
        return measure(keep=keep)
    except KeyboardInterrupt:
        if not found:
            raise
        show(args, found[0])
        where = f"; {args.json} has it" if args.json else ""
        message = f"stopped: above is what was measured until then{where}"
        raise InterruptedRunError(message) from None


def _write(file: str, result: dict) -> None:
    text = json.dumps(result, indent=1) + "\n"
    write_whole(Path(file), lambda path: path.write_text(text))


def show(args: argparse.Namespace, result: dict, brief: bool = False) -> int:
    """Print the table, write what was asked for; 1 where a variant failed parity."""
    from ema_timm.bench.report.kinds import table
    from ema_timm.bench.report.picture import plot

    if args.json:
        _write(args.json, result)
    print(table(result, brief))
    if args.plot:
        plot(result, args.plot)
    return 0 if all(row.get("parity", True) for row in result["rows"]) else 1
