"""TorchScript: the network's Python, compiled; ``torch.jit.load`` reads it back."""

from pathlib import Path

import torch
from torch import Tensor, nn


def write_torchscript(model: nn.Module, example: Tensor, path: Path) -> None:
    """A scripted network. It is compiled and not traced, so that ``example`` plays no part."""
    torch.jit.script(model).save(str(path))
