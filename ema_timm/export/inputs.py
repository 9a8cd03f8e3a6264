"""The sizes of the input that are fixed, and inputs of several sizes that a file must support."""

from typing import NamedTuple

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ema_timm.errors import UserError, sentence

FREE_AXES = {0: "batch", 2: "height", 3: "width"}
"""Axes of the input, (B, C, H, W), whose sizes a file leaves free by default, with their names."""


class InputSize(NamedTuple):
    """The sizes of the input that are fixed; None is free.

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


def one_image(model: nn.Module, fixed: InputSize) -> InputSize:
    """Fix the sizes to one image: of the network's own size, unless ``fixed`` has another.

    Raises:
        UserError: If ``fixed`` has another batch size than 1.
    """
    if fixed.batch not in (None, 1):
        raise UserError(
            f"ncnn computes one image at a time, got --batch-size {fixed.batch}. Leave it out."
        )
    own = resolve_data_config(model=model)["input_size"]
    return InputSize(fixed.image or (own[1], own[2]), 1)


def check_inputs(model: nn.Module, fixed: InputSize = ALL_FREE) -> list[Tensor]:
    """Make inputs of three sizes, the network's own first; the last is the exporters' example.

    Args:
        model: The network.
        fixed: The sizes that are the same in all three.
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
    """Check that the network itself supports every input.

    Raises:
        UserError: If it does not.
    """
    for x in inputs:
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, AssertionError) as error:
            unsupported = (
                f"this network does not support images of {x.shape[2]}x{x.shape[3]} pixels: "
                f"{sentence(error)}"
            )
            if fixed.image is None:
                unsupported += (
                    " Without --img-size the exported file must support several image sizes. Give "
                    "the size of your images with --img-size."
                )
            raise UserError(unsupported) from error
