"""Checks a detector's folder before it is published, and computes outputs to compare."""

from pathlib import Path

import torch
from torch import Tensor

from ema_timm.checkpoints.check import CheckedFolder, with_card
from ema_timm.checkpoints.layout import CARD, CONFIG, RESULTS, WEIGHTS
from ema_timm.checkpoints.pictures import check_real
from ema_timm.integrations.yolo.card import detector_card_text
from ema_timm.integrations.yolo.contents import DESCRIPTION, MODEL, read_description
from ema_timm.integrations.yolo.detector import trace_rows
from ema_timm.integrations.yolo.folder import load
from ema_timm.integrations.yolo.results import known_facts, read_own_results

_SAMPLES = 256


def is_detector(path: str | Path) -> bool:
    """Whether a folder is a detector's: it has the files of one, and no network of timm."""
    path = Path(path)
    named = any((path / name).is_file() for name in (DESCRIPTION, MODEL))
    return named and not (path / CONFIG).is_file()


def check_detector(path: str | Path) -> CheckedFolder:
    """Check a detector's folder that is to be published.

    Returns:
        The folder; its ``config`` is the content of detector.json.

    Raises:
        UserError: For the first thing that is missing, damaged, or belongs to another detector.
    """
    path = Path(path)
    names = (WEIGHTS, MODEL, DESCRIPTION, CARD, RESULTS)
    for name in names:
        check_real(path / name)
    described = read_description(path)
    results = read_own_results(path, known_facts(path, described, load(path)))
    return with_card(path, names, described, results, detector_card_text(results))


@torch.inference_mode()
def fixed_outputs(source: str | Path, revision: str | None = None) -> list[list[float]]:
    """Samples of a detector's outputs for a fixed image.

    Args:
        source: As in `ema_timm.integrations.yolo.load`.
        revision: The same.

    Returns:
        Numbers from each map that its last row takes, and from each that it computes of them.
        The choice of boxes, which may depend on rounding, is not among them.
    """
    yolo = load(source, revision)
    net = yolo.model.eval()
    maps = trace_rows(net)[0]
    head, found = net.model[-1], list(maps)
    if type(yolo).__name__ == "YOLO":  # RT-DETR's head chooses places first
        head.training = True  # only of the head: its norms stay in eval mode
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
