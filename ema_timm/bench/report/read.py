"""A measurement's JSON, read back."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ema_timm.errors import UserError


@contextlib.contextmanager
def measurement(file: str | Path) -> Iterator[dict]:
    """What ``ema-timm bench --json`` wrote.

    Raises:
        UserError: If the file is something else, or the block finds that it is.
    """
    try:
        yield json.loads(Path(file).read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a measurement of ema-timm bench --json.") from error
