"""Writes the README.md of a checkpoint folder from its results. Edited cards are kept."""

import difflib
from pathlib import Path
from typing import NamedTuple

from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.config import completed, read_config
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.checkpoints.network import check_network
from ema_timm.checkpoints.results import read_own_results, without_local_paths
from ema_timm.errors import UserError


class EditedCardError(UserError):
    """The card was edited by hand and is kept; ``diff`` shows what would change."""

    def __init__(self, message: str, diff: str):
        super().__init__(message)
        self.diff = diff


class WrittenCard(NamedTuple):
    """The result of `write_card`.

    Attributes:
        changed: Whether README.md has changed.
        unknown: Fields that readers look for and that are not set.
    """

    changed: bool
    unknown: list[str]


def write_card(path: str | Path, fields: dict | None = None, force: bool = False) -> WrittenCard:
    """Write a folder's README.md from its results.json.

    Whether the card is written or kept, config.json is completed, and local paths are removed from
    results.json.

    Args:
        path: A checkpoint folder.
        fields: Fields that cannot be measured (``license``, ``datasets``, …). They are saved in
            results.json, so that they need to be given only once.
        force: Replace a card that was edited by hand.

    Raises:
        EditedCardError: If the card was edited by hand and ``force`` is off.
        UserError: If the folder is damaged, or its results are of other weights.
    """
    path, folder = Path(path), CheckpointWriter(path)
    # config.json first: timm builds the network by it.
    folder.save_config(completed(read_config(path)))
    found = read_own_results(path, check_network(path))
    results = without_local_paths(found)
    if results != found:
        folder.write_json(RESULTS, results)
    updated = results
    if fields:
        updated = {**results, "card": {**results.get("card", {}), **fields}}
    changed = save_card(path, card_text(updated), updated, updated != results, force)
    return WrittenCard(changed, _unknown(updated))


def save_card(path: Path, text: str, results: dict, new_results: bool, force: bool) -> bool:
    """Write README.md, and before it results.json if it is new.

    Returns:
        Whether README.md has changed.

    Raises:
        EditedCardError: If the card was edited by hand and ``force`` is off.
    """
    old, writer = read_card(path), CheckpointWriter(path)
    if old is not None and not force:
        kept = (
            f"{path / CARD} was edited by hand and is kept; the difference is above. Replace it "
            f"with: ema-timm card {path} --force"
        )
        require_unedited(old, text, (str(path / CARD), "as it would be written"), kept)
    if new_results:
        writer.write_json(RESULTS, results)
    if text != old:
        writer.write_text(CARD, text)
    return text != old


def read_card(path: Path) -> str | None:
    """The README.md of a folder, or None if there is none.

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
        old: The card that exists.
        new: The card that would replace it.
        names: Names of the two in the diff.
        kept: The message of the error.

    Raises:
        EditedCardError: If ``old`` differs from ``new`` and was not generated.
    """
    if old == new or is_generated(old):
        return
    lines = (text.splitlines(keepends=True) for text in (old, new))
    raise EditedCardError(kept, "".join(difflib.unified_diff(*lines, *names)))


def _unknown(results: dict) -> list[str]:
    """Fields that readers look for and that are not set; the licence may be the base's."""
    base = results.get("base") or {}
    known = {"license": base.get("license"), "datasets": None, **results.get("card", {})}
    return [name for name, value in known.items() if not value]
