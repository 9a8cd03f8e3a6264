"""Checks a checkpoint folder before it is published, so that it loads everywhere.

The weights are complete, finite and those of the network in config.json. results.json and README.md
are of these weights. Only real files of the folder are published, and of its figures only those
that the card shows or results.json names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ema_timm.checkpoints.cards.file import read_card
from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.config import (
    STUB,
    completed,
    loading_keys,
    needs_auto_map,
    read_config,
    stub_text,
)
from ema_timm.checkpoints.layout import CARD, CONFIG, RESULTS, WEIGHTS
from ema_timm.checkpoints.network import check_network
from ema_timm.checkpoints.pictures import check_real, named_pictures, other_pictures
from ema_timm.checkpoints.results import read_own_results, without_local_paths
from ema_timm.errors import UserError, some


@dataclass(frozen=True)
class CheckedFolder:
    """A folder that passed every check.

    Attributes:
        path: The folder.
        config: Content of config.json.
        results: Content of results.json.
        card: Text of README.md.
        weights_sha256: Hex sha256 of model.safetensors.
        files: What is published, by name in the folder: weights, config, card, results, the stub
            that ``auto_map`` names, figures that card or results name. Never a pickle, never
            ``training/``.
        skipped: Figures in the folder that neither names. They are not published.
    """

    path: Path
    config: dict
    results: dict
    card: str
    weights_sha256: str
    files: tuple[str, ...]
    skipped: tuple[str, ...]


def check_publishable(path: str | Path) -> CheckedFolder:
    """Check a folder that is to be published.

    Raises:
        UserError: For the first thing that is missing, damaged, or belongs to another checkpoint.
    """
    path = Path(path)
    for name in (WEIGHTS, CONFIG, CARD, RESULTS, STUB):
        check_real(path / name)
    _check_complete(path, read_config(path))
    config = check_network(path)
    results = read_own_results(path, config)
    if without_local_paths(results) != results:
        raise UserError(
            f"{path / RESULTS} holds local paths (in arguments, arguments.model_kwargs). "
            f"ema-timm card {path} removes them."
        )
    names = [WEIGHTS, CONFIG, CARD, RESULTS]
    if needs_auto_map(config["architecture"]):
        names.append(STUB)
    return with_card(path, names, config, results, card_text(results))


def with_card(
    path: Path, names: Sequence[str], config: dict, results: dict, text: str
) -> CheckedFolder:
    """The folder, after a check of its card and of the figures that card and results name.

    Args:
        path: The folder.
        names: Its files that are published, without the figures.
        config: Content of its configuration.
        results: Content of its results.json.
        text: The card that these results give.

    Raises:
        UserError: If the card is missing or was generated from other results, or a figure is not
            a file of the folder.
    """
    write = f"Write it with: ema-timm card {path}"
    card = read_card(path)
    if card is None:
        raise UserError(f"{path / CARD} is missing. {write}")
    if is_generated(card) and card != text:
        raise UserError(f"{path / CARD} is not of these results. {write}")
    pictures = named_pictures(path, card, results)
    return CheckedFolder(
        path=path,
        config=config,
        results=results,
        card=card,
        weights_sha256=results["weights_sha256"],
        files=(*names, *pictures),
        skipped=tuple(other_pictures(path, pictures)),
    )


def _check_complete(path: Path, config: dict) -> None:
    found = loading_keys(config)
    if found:
        raise UserError(
            f"{path / CONFIG} says how one machine loaded the weights ({some(found)}), which does "
            f"not work for readers. ema-timm card {path} repairs it."
        )
    if completed(config) != config:
        raise UserError(
            f"{path / CONFIG} is not complete: transformers refuses num_classes in model_args, and "
            f"needs auto_map for {config['architecture']}. ema-timm card {path} repairs it."
        )
    if not needs_auto_map(config["architecture"]):
        return
    stub = path / STUB
    if not stub.is_file() or stub.read_text("utf-8") != stub_text():
        raise UserError(
            f"{stub}, which auto_map names, is missing or altered. ema-timm card {path} repairs it."
        )
