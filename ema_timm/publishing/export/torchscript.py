"""TorchScript: the network's Python, compiled; ``torch.jit.load`` reads it back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ema_timm.publishing.export.network import FREE_AXES


def write_torchscript(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str] = FREE_AXES
) -> None:
    """A scripted network. It is compiled and not traced: ``example`` and ``free`` play no part."""
    torch.jit.script(model).save(str(path))
