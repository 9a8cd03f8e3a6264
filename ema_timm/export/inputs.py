"""The network that is exported, and the inputs of several sizes that it must take."""

from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ema_timm.checkpoints.network import open_network
from ema_timm.errors import UserError, first_line

FREE_AXES = {0: "batch", 2: "height", 3: "width"}
"""Axes of the input, (B, C, H, W), whose sizes a file leaves free unless told otherwise."""


class InputSize(NamedTuple):
    """What is fixed of the sizes of the input; None is free.

    Attributes:
        image: (H, W).
        batch: B.
    """

    image: tuple[int, int] | None = None
    batch: int | None = None

    def free(self) -> dict[int, str]:
        """The axes that stay free, with their names."""
        fixed = {0: self.batch, 2: self.image, 3: self.image}
        return {axis: name for axis, name in FREE_AXES.items() if fixed[axis] is None}


ALL_FREE = InputSize()


def load(folder: str | Path, **options) -> nn.Module:
    """The network of a checkpoint folder, for inference.

    Args:
        folder: A checkpoint in timm's format.
        options: What timm makes the network with, such as ``scriptable=True``.

    Raises:
        UserError: If the folder holds no checkpoint, or a damaged one.
    """
    return open_network(f"local-dir:{folder}", **options)[0].eval()


def check_inputs(model: nn.Module, fixed: InputSize = ALL_FREE) -> list[Tensor]:
    """Inputs of three sizes, the network's own first; the last is the exporters' example.

    Args:
        model: The network.
        fixed: What of their sizes is the same in all.
    """
    channels, height, width = resolve_data_config(model=model)["input_size"]
    images = [(height, width), (height + 32, width), (height // 2 + 16, width // 2 + 25)]
    sizes = [
        (fixed.batch or batch, channels, *(fixed.image or image))
        for batch, image in zip((1, 3, 2), images, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def require_sizes(model: nn.Module, inputs: list[Tensor], fixed: InputSize) -> None:
    """See that the network itself takes every input.

    Raises:
        UserError: If not.
    """
    for x in inputs:
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, AssertionError) as error:
            size = f"{x.shape[2]}x{x.shape[3]}"
            said = "this network does not take"
            if fixed.image is None:
                said = f"export leaves the image size free without --size, and {said}"
            raise UserError(f"{said} {size}: {first_line(error)}") from error
