"""The README.md of a checkpoint folder: written from its results, never over somebody's edits."""

import difflib
from pathlib import Path
from typing import NamedTuple

from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.config import completed, read_config
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.checkpoints.network import check_network
from ema_timm.checkpoints.results import read_own_results, without_places
from ema_timm.errors import UserError


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
    """Write a folder's README.md from its results.json, and put right what others say too much.

    config.json is completed, and results.json loses where files were, whether the card is written
    or kept.

    Args:
        path: A checkpoint folder.
        told: Facts that nobody can measure (``license``, ``datasets``, …); kept in results.json,
            so that they need to be told once.
        force: Replace a card that was edited by hand.

    Raises:
        EditedCardError: If the card was edited by hand and ``force`` is off.
        UserError: If the folder is damaged, or its results are of other weights.
    """
    path, folder = Path(path), CheckpointWriter(path)
    # Both whether the card is written or not; config.json first, for timm builds by it.
    folder.save_config(completed(read_config(path)))
    found = read_own_results(path, check_network(path))
    results = without_places(found)
    if results != found:
        folder.write_json(RESULTS, results)
    updated = {**results, "card": {**results.get("card", {}), **told}} if told else results
    text, old = card_text(updated), read_card(path)
    if old is not None and not force:
        kept = (
            f"{path / CARD} was edited by hand and is kept; the difference is above. Replace it "
            "with --force."
        )
        require_unedited(old, text, (str(path / CARD), "as it would be written"), kept)
    if updated != results:
        folder.write_json(RESULTS, updated)
    if text != old:
        folder.write_text(CARD, text)
    return WrittenCard(text != old, _unknown(updated))


def read_card(path: Path) -> str | None:
    """The README.md of a folder, or None where there is none.

    Raises:
        UserError: If it cannot be read as text.
    """
    file = path / CARD
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:  # ValueError: not UTF-8
        raise UserError(
            f"{file} cannot be read: {error}. Rename or remove it, then write it with: "
            f"ema-timm card {path}"
        ) from error


def require_unedited(old: str, new: str, names: tuple[str, str], kept: str) -> None:
    """Refuse to replace a card that somebody has written or edited.

    Args:
        old: The card that is there.
        new: The card that would replace it.
        names: What the two are called in the difference.
        kept: The message that goes with it.

    Raises:
        EditedCardError: If ``old`` is not as it was generated, and says something else.
    """
    if old == new or is_generated(old):
        return
    lines = (text.splitlines(keepends=True) for text in (old, new))
    raise EditedCardError(kept, "".join(difflib.unified_diff(*lines, *names)))


def _unknown(results: dict) -> list[str]:
    """Facts that readers look for and nobody has told; the licence may be the base's."""
    base, told = results.get("base") or {}, results.get("card", {})
    known = {"license": base.get("license"), "datasets": None, **told}
    return [name for name, value in known.items() if not value]
