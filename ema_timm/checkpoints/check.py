"""A checkpoint folder, read and checked before anyone is given it.

Everything that publishes goes through here, so that a folder that loads here loads
elsewhere: the weights are whole, finite and those of the network that config.json names, and
results.json and README.md speak of these weights. It also says what is given: real files of the
folder, and of its pictures those that the card shows or results.json names.
"""

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
from ema_timm.checkpoints.results import read_own_results, without_places
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
            that ``auto_map`` names, pictures that card or results name. Never a pickle, never
            ``training/``.
        left_out: Pictures in the folder that neither names, and that stay.
    """

    path: Path
    config: dict
    results: dict
    card: str
    weights_sha256: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def check_publishable(path: str | Path) -> CheckedFolder:
    """Read a folder that is to be published.

    Raises:
        UserError: With what failed and the remedy, for the first thing that is missing, damaged,
            or belongs to something else.
    """
    path = Path(path)
    for name in (WEIGHTS, CONFIG, CARD, RESULTS, STUB):
        check_real(path / name)
    _check_complete(path, read_config(path))
    config = check_network(path)
    results = read_own_results(path, config)
    if without_places(results) != results:
        raise UserError(
            f"{path / RESULTS} says where files were on a machine (in arguments, "
            f"arguments.model_kwargs). ema-timm card {path} repairs it."
        )
    card = _check_card(path, results)
    pictures = named_pictures(path, card, results)
    names = [WEIGHTS, CONFIG, CARD, RESULTS]
    if needs_auto_map(config["architecture"]):
        names.append(STUB)
    return CheckedFolder(
        path=path,
        config=config,
        results=results,
        card=card,
        weights_sha256=results["weights_sha256"],  # that of the file, by now
        files=(*names, *pictures),
        left_out=tuple(other_pictures(path, pictures)),
    )


def _check_complete(path: Path, config: dict) -> None:
    found = loading_keys(config)
    if found:
        raise UserError(
            f"{path / CONFIG} says how a machine loaded the weights ({some(found)}), which no "
            f"reader can do. ema-timm card {path} repairs it."
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


def _check_card(path: Path, results: dict) -> str:
    file = path / CARD
    write = f"Write it with: ema-timm card {path}"
    card = read_card(path)
    if card is None:
        raise UserError(f"{file} is missing. {write}")
    if is_generated(card) and card != card_text(results):
        raise UserError(f"{file} is not of these results. {write}")
    return card
