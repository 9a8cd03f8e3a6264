"""The command ``ema-timm``: each subcommand parses, makes one library call and prints.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped.
"""

import argparse
import sys
from collections.abc import Sequence

from ema_timm import __version__
from ema_timm.cli import (
    bench,
    checkpoints,
    env,
    measure,
    publishing,
    recipes,
    see,
    training,
    tune,
    yolo,
)
from ema_timm.errors import HubError, InterruptedRunError, UserError, VerificationError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"ema-timm: {_message(error)}", file=sys.stderr)
        return 2
    except InterruptedRunError as error:
        print(f"ema-timm: {error}", file=sys.stderr)
        return 130
    except (HubError, VerificationError) as error:
        print(f"ema-timm: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ema-timm: {error}. What was saved before is whole.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ema-timm: stopped.", file=sys.stderr)
        return 130


def _message(error: UserError) -> str:
    """The one line; a loader process wraps it in its traceback, which ends with it."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).strip().splitlines()[-1].removeprefix(kind)


def build_parser() -> argparse.ArgumentParser:
    """The command line, built without importing torch."""
    parser = argparse.ArgumentParser(
        prog="ema-timm",
        description="EMA attention (Efficient Multi-scale Attention) for timm: train, measure, "
        "publish. Not an exponential moving average.",
    )
    parser.add_argument("--version", action="version", version=f"ema-timm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for group in (training, recipes, measure, see, checkpoints, publishing, yolo, bench, tune, env):
        group.add_commands(commands)
    return parser
