"""The places of EMA attention in a timm network.

ResNet (`BasicBlock`, `Bottleneck`): every block, on its output before the shortcut is added.
MobileNetV2 (`InvertedResidual`): after the depth-wise convolution, if the expanded width is over
144, as in the authors' fork of timm. Both are the block's ``se`` attribute. Stages have the number
in their module's name: ``layer1`` to ``layer4``; ``blocks.0`` to ``blocks.6``.
"""

import re
from typing import NamedTuple

from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

MIN_EXPANDED_WIDTH = 145
"""MobileNetV2 blocks below this expanded width get no EMA attention (the authors' fork)."""

_STAGE = re.compile(r"(?:^|\.)(?:layer|blocks[._])(\d+)(?=[._])")


class Slot(NamedTuple):
    """A place for EMA attention in a network.

    Attributes:
        path: Dotted name of the block in the network.
        block: The timm block; its attribute ``se`` is the layer.
        stage: Number of its stage, as in the module's name.
        channels: Width of the gated feature map.
        doubled: Names, within the block, of the tensors that undo a constant gate of 0.5 when
            doubled: the affine part of the norm before the slot, or the convolution after it.
    """

    path: str
    block: nn.Module
    stage: int
    channels: int
    doubled: tuple[str, ...]

    @property
    def doubled_names(self) -> list[str]:
        """The doubled tensors' names in the network's state dict."""
        return [f"{self.path}.{name}" if self.path else name for name in self.doubled]

    @property
    def filled(self) -> bool:
        """Whether the block has an attention layer."""
        return not (self.block.se is None or isinstance(self.block.se, nn.Identity))


def find_slots(model: nn.Module) -> list[Slot]:
    """All places of the paper in ``model``, filled or empty, in network order."""
    slots = []
    for path, block in model.named_modules():
        stage = _STAGE.findall(f"{path}.")
        if not stage:
            continue
        place = _placement(block)
        if place is not None:
            slots.append(Slot(path, block, int(stage[-1]), *place))
    return slots


def unnumbered_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that `find_slots` leaves out, because their stage has no number."""
    found = {id(slot.block) for slot in find_slots(model)}
    return [
        path
        for path, block in model.named_modules()
        if id(block) not in found and _placement(block) is not None
    ]


def slot_layers(model: nn.Module) -> list[nn.Module]:
    """The attention layers in these places of ``model``, in network order."""
    return [slot.block.se for slot in find_slots(model) if slot.filled]


def _placement(block: nn.Module) -> tuple[int, tuple[str, ...]] | None:
    """Width of the gated map and the tensors to double, or None for other blocks."""
    if isinstance(block, Bottleneck):
        return block.conv3.out_channels, ("bn3.weight", "bn3.bias")
    if isinstance(block, BasicBlock):
        return block.conv2.out_channels, ("bn2.weight", "bn2.bias")
    if isinstance(block, InvertedResidual) and isinstance(block.conv_pwl, nn.Conv2d):
        if block.conv_pwl.in_channels >= MIN_EXPANDED_WIDTH:
            return block.conv_pwl.in_channels, ("conv_pwl.weight",)
    return None
