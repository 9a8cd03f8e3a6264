"""Errors that are not bugs. Each has an exit code, and a message of one line with the remedy."""

import signal
from collections.abc import Sequence
from importlib.util import find_spec

_PROJECTS = {"pytorch_grad_cam": "grad-cam", "sklearn": "scikit-learn"}
"""Projects whose packages have other names."""


class UserError(Exception):
    """Bad input (exit code 2). The message is one line: what is wrong, what to do."""


class UnreadableImageError(UserError):
    """An image of the data set cannot be decoded."""


class InterruptedRunError(Exception):
    """A run was stopped by a signal. The message says how to continue it.

    Args:
        message: The message.
        signum: The number of the signal. The exit code is 128 plus this number.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.signum = int(signum)


class ReportedError(Exception):
    """The cause of an error that another process of the run reports."""


class HubError(Exception):
    """A request to the Hub failed (exit code 1). The message says which one, and what to do."""


class CannotCompileError(RuntimeError):
    """Triton has no compiler, or no folder to write to. The message says in one line what to do."""


class VerificationError(Exception):
    """A result did not pass its check and was not kept (exit code 1)."""


LONGEST_REASON = 400
"""Most characters of another library's error in a message."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a cell of a table.

    If it has no message, its type.
    """
    return _lines(error)[0]


def one_line(error: BaseException) -> str:
    """Another library's error with its lines joined, cut after `LONGEST_REASON` characters."""
    text = " ".join(line.strip() for line in _lines(error) if line.strip()).rstrip(". ")
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def sentence(error: BaseException) -> str:
    """`one_line` with a period at its end, to be followed by what to do."""
    return one_line(error) + "."


def _lines(error: BaseException) -> list[str]:
    """The lines of an error's message, or its type.

    If a package was missing while another error was handled, that error is the one to report:
    once ultralytics is imported, Pillow asks for one more decoder before it reports a bad file.
    """
    if isinstance(error, ImportError) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, KeyError):  # its message is only the key
        return [f"{type(error).__name__}: {error}"]
    return str(error).strip().splitlines() or [type(error).__name__]


def some(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def require_packages(names: Sequence[str], extra: str = "", purpose: str = "this") -> None:
    """Check that optional packages are installed, before any work.

    Args:
        names: The packages, as they are imported.
        extra: The extra of ema-timm that installs them, if there is one.
        purpose: What needs them, for the message.

    Raises:
        UserError: If one is not installed.
    """
    missing = [_PROJECTS.get(name, name) for name in names if find_spec(name) is None]
    if missing:
        install = f"'ema-timm[{extra}]'" if extra else " ".join(missing)
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install {install}")
