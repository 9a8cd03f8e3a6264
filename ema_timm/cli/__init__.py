"""The command ``ema-timm``: each subcommand parses, makes one library call and prints.

Results go to stdout, messages to stderr.
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from functools import partial

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
from ema_timm.errors import (
    HubError,
    InterruptedRunError,
    ReportedError,
    UserError,
    VerificationError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        return _report(error, _message(error), 2)
    except InterruptedRunError as error:
        return _report(error, str(error), 128 + error.signum)
    except (HubError, VerificationError) as error:
        return _report(error, str(error), 1)
    except OSError as error:
        return _report(error, f"{error}. Files written before are intact.", 1)
    except KeyboardInterrupt as error:
        return _report(error, "interrupted.", 130)


def _report(error: BaseException, message: str, code: int) -> int:
    """Print an error, unless another process of the run prints it. Returns the exit code."""
    if not isinstance(error.__cause__, ReportedError):
        print(f"ema-timm: {message}", file=sys.stderr)
    return code


def _message(error: UserError) -> str:
    """The error in one line. A data-loader process wraps it in a traceback that ends with it."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}: "
    message = str(error).strip().rpartition(f"\n{kind}")[2]
    return " ".join(line.strip() for line in message.splitlines())


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps indented lines of a text as they are, so that examples can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") else fill(line, width, indent) for line in lines
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line, built without importing torch."""
    parser = argparse.ArgumentParser(
        prog="ema-timm",
        description="Train, measure, compare, export and publish timm models with EMA attention "
        "(Efficient Multi-scale Attention; not an exponential moving average).",
    )
    parser.add_argument("--version", action="version", version=f"ema-timm {__version__}")
    subparser = partial(argparse.ArgumentParser, formatter_class=_HelpFormatter)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=subparser
    )
    for group in (training, recipes, measure, see, checkpoints, publishing, yolo, bench, tune, env):
        group.add_commands(commands)
    return parser
