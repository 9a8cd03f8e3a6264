"""The names of the files in a checkpoint folder, and how its JSON is read."""

from pathlib import Path

from ema_timm.errors import UserError
from ema_timm.fields import load_json
from ema_timm.files import WEIGHTS

__all__ = ["CARD", "CONFIG", "RESULTS", "WEIGHTS", "read_json"]

CONFIG = "config.json"
RESULTS = "results.json"
CARD = "README.md"


def read_json(file: Path, remedy: str) -> dict:
    """Read a JSON object, without fields that are null: unknown, as if they were missing.

    Raises:
        UserError: If the file holds none; the message ends with ``remedy``.
    """
    try:
        content = load_json(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing. {remedy}") from error
    except (ValueError, OSError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{file} cannot be read: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(content).__name__}. {remedy}")
    return {name: value for name, value in content.items() if value is not None}
