"""``torch.export``: the graph of PyTorch's own operators, as a ``.pt2`` file."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def write_pt2(model: nn.Module, example: Tensor, path: Path) -> None:
    """An exported program, sizes free."""
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The program of a ``.pt2`` file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()
