"""The README.md of a checkpoint folder: written from its results, never over somebody's edits."""

import difflib
from pathlib import Path
from typing import NamedTuple

from ema_timm.checkpoints.card import card_text, is_generated
from ema_timm.checkpoints.check import CARD, RESULTS, WEIGHTS, check_belongs, check_network
from ema_timm.checkpoints.config import completed
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.results import read_results
from ema_timm.errors import UserError
from ema_timm.files import sha256


class EditedCardError(UserError):
    """The card was edited by hand and is kept; ``diff`` is what writing it would change."""

    def __init__(self, message: str, diff: str):
        super().__init__(message)
        self.diff = diff


class WrittenCard(NamedTuple):
    """What `write_card` did.

    Attributes:
        changed: Whether README.md is another than before.
        unknown: Facts that readers look for and nobody has told.
    """

    changed: bool
    unknown: list[str]


def write_card(path: str | Path, told: dict | None = None, force: bool = False) -> WrittenCard:
    """Write a folder's README.md from its results.json, and complete its config.json.

    Args:
        path: A checkpoint folder.
        told: Facts that nobody can measure (``license``, ``datasets``, …); kept in results.json,
            so that they need to be told once.
        force: Replace a card that was edited by hand.

    Raises:
        EditedCardError: If the card was edited by hand and ``force`` is off.
        UserError: If the folder is damaged, or its results are of other weights.
    """
    path = Path(path)
    config = check_network(path)
    results = read_results(path / RESULTS)
    check_belongs(path, config, results, sha256(path / WEIGHTS))
    updated = dict(results)
    if told:
        updated["card"] = {**results.get("card", {}), **told}
    text, old = card_text(updated), _read(path / CARD)
    if old not in (None, text) and not is_generated(old) and not force:
        raise EditedCardError(
            f"{path / CARD} was edited by hand and is kept; the difference is above. Replace it "
            "with --force.",
            "".join(
                difflib.unified_diff(
                    old.splitlines(keepends=True),
                    text.splitlines(keepends=True),
                    str(path / CARD),
                    "as it would be written",
                )
            ),
        )
    folder = CheckpointWriter(path)
    folder.save_config(completed(config))
    if updated != results:
        folder.write_json(RESULTS, updated)
    if text != old:
        folder.write_text(CARD, text)
    told, base = updated.get("card", {}), updated.get("base") or {}
    known = {"license": base.get("license"), "datasets": None, **told}
    return WrittenCard(text != old, [name for name, value in known.items() if not value])


def _read(file: Path) -> str | None:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is not UTF-8: {error}. Rename or remove it.") from error
