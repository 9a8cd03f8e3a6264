"""Ends of a command that are not bugs: each message is one clear line, each has an exit code."""

from collections.abc import Sequence
from importlib.util import find_spec


class UserError(Exception):
    """Bad input (exit code 2). The message is one line: the rule, what came, the remedy."""


class UnreadableImageError(UserError):
    """An image of the data set cannot be decoded."""


class InterruptedRunError(Exception):
    """A run was asked to stop (exit code 130). The message says how to continue it."""


class HubError(Exception):
    """The Hub, or the way to it, failed (exit code 1). The message says where, and the remedy."""


class CannotCompileError(RuntimeError):
    """Triton has no compiler, or no folder to write to. The message is one line with the remedy."""


class VerificationError(Exception):
    """What was made does not do what it must, and was not kept (exit code 1)."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type, where it says nothing.

    Where a package was missed while another error was handled, that one is what went wrong: with
    ultralytics in the process, Pillow asks for one more reader before it says what it cannot read.
    """
    if isinstance(error, ImportError) and error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def some(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# MERGED: What the formats and runtimes need beyond PyTorch.
def require_packages(*packages: str) -> None:
    """Name what is missing, before any work.

    Raises:
        UserError: If a package is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'ema-timm[export]'")
