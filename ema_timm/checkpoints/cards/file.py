"""Writes the README.md of a checkpoint folder from its results. Edited cards are kept."""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.config import completed, read_config
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.checkpoints.network import check_network
from ema_timm.checkpoints.results import read_own_results, without_local_paths
from ema_timm.errors import UserError
from ema_timm.options import option_name


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
        UserError: If a field is not what the Hub takes, the folder is damaged, or its results are
            of other weights.
    """
    path, folder, fields = Path(path), CheckpointWriter(path), fields or {}
    check_card_fields(fields)
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


def check_card_fields(fields: dict[str, Any]) -> None:
    """Check what is given for a card, because the Hub refuses a commit with a wrong one.

    Raises:
        UserError: For a name that the Hub cannot have, a licence that is not an identifier, or a
            link to one that is neither a file nor on the web.
    """
    repositories = {name: [fields[name]] for name in ("base_model", "repo_id") if name in fields}
    for name, ids in {**repositories, "trained_on": fields.get("datasets", [])}.items():
        for each in ids:
            try:
                validate_repo_id(each)
            except HFValidationError as error:
                raise UserError(f"{option_name(name)} {each!r}: {error} Give USER/NAME.") from error
    if fields.get("repo_id", "/").count("/") != 1:
        raise UserError(f"--repo-id must be USER/NAME, got {fields['repo_id']!r}.")
    licence, link = fields.get("license", "mit"), fields.get("license_link", "LICENSE")
    if not re.fullmatch("[a-z0-9.-]+", licence):
        raise UserError(
            f"--license must be an identifier of the Hub in lower case, such as mit, apache-2.0 or "
            f"other, got {licence!r}."
        )
    if not re.fullmatch(r"https?://[^\s<>]+|[\w.-]+", link):
        raise UserError(
            f"--license-link must be a file such as LICENSE or begin with https://, got {link!r}."
        )


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
