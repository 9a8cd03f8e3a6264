"""``torch.export``: the graph of PyTorch's own operators, as a ``.pt2`` file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ema_timm.publishing.export.network import FREE_AXES


def write_pt2(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """An exported program; the sizes of the axes in ``free`` stay free."""
    shapes = (dict.fromkeys(free, torch.export.Dim.AUTO),)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The program of a ``.pt2`` file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()
