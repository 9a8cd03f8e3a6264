"""A detector's folder, read and checked before anyone is given it; what of it is given."""

from pathlib import Path

import torch
from torch import Tensor

from ema_timm.checkpoints.cards.file import read_card
from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.check import CheckedFolder
from ema_timm.checkpoints.layout import CARD, CONFIG, RESULTS, WEIGHTS
from ema_timm.checkpoints.pictures import check_real, named_pictures, other_pictures
from ema_timm.errors import UserError
from ema_timm.integrations.yolo.card import detector_card_text
from ema_timm.integrations.yolo.contents import DESCRIPTION, MODEL, read_description
from ema_timm.integrations.yolo.detector import trace_rows
from ema_timm.integrations.yolo.folder import load
from ema_timm.integrations.yolo.results import known_facts, read_own_results

_SAMPLES = 256


def is_detector(path: str | Path) -> bool:
    """Whether a folder is meant as a detector's: it has its files, and no network of timm."""
    path = Path(path)
    named = any((path / name).is_file() for name in (DESCRIPTION, MODEL))
    return named and not (path / CONFIG).is_file()


def check_detector(path: str | Path) -> CheckedFolder:
    """Read a detector's folder that is to be published.

    Returns:
        What is published; its ``config`` is the content of detector.json.

    Raises:
        UserError: With what failed and the remedy, for the first thing that is missing, damaged,
            or belongs to something else.
    """
    path = Path(path)
    names = (WEIGHTS, MODEL, DESCRIPTION, CARD, RESULTS)
    for name in names:
        check_real(path / name)
    described, yolo = read_description(path), load(path)
    write = f"Write it with: ema-timm card {path}"
    card = read_card(path)
    if card is None:
        raise UserError(f"{path / CARD} is missing. {write}")
    results = read_own_results(path, known_facts(path, described, yolo))
    if is_generated(card) and card != detector_card_text(results):
        raise UserError(f"{path / CARD} is not of these results. {write}")
    pictures = named_pictures(path, card, results)
    return CheckedFolder(
        path=path,
        config=described,
        results=results,
        card=card,
        weights_sha256=results["weights_sha256"],
        files=(*names, *pictures),
        left_out=tuple(other_pictures(path, pictures)),
    )


@torch.inference_mode()
def fixed_outputs(source: str | Path, revision: str | None = None) -> list[list[float]]:
    """What a detector computes of a fixed picture, sampled.

    Args:
        source: As in `ema_timm.integrations.yolo.load`.
        revision: The same.

    Returns:
        A row of numbers for each map that its last row is given, and for each that this row makes
        of them; the choice of boxes, which may hang on rounding, is left out.
    """
    yolo = load(source, revision)
    net = yolo.model.eval()
    maps = trace_rows(net)[0]
    head, found = net.model[-1], list(maps)
    if type(yolo).__name__ == "YOLO":  # RT-DETR's head chooses places before it does anything
        head.training = True  # of the head alone: its norms stay as they are
        given = [each.clone() for each in maps]
        found += _tensors(head(given[0] if isinstance(head.f, int) else given))
    return [_sample(each) for each in found]


def _tensors(output) -> list[Tensor]:
    """Every tensor in what a head returns, which differs between tasks and versions."""
    if isinstance(output, Tensor):
        return [output]
    if not isinstance(output, dict | list | tuple):
        return []
    parts = output.values() if isinstance(output, dict) else output
    return [each for part in parts for each in _tensors(part)]


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, _SAMPLES).long()].tolist()
