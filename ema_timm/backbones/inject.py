"""The one seam: which blocks of a timm network get EMA attention, and with how many groups.

ResNet (`BasicBlock`, `Bottleneck`): every block, on its output before the shortcut is added.
MobileNetV2 (`InvertedResidual`): after the depth-wise convolution, where the expanded width is
over 144, as in the authors' fork of timm. Both are timm's ``se`` slot. Stages carry the number in
their module's name: ``layer1`` to ``layer4``; ``blocks.0`` to ``blocks.6``.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from timm.models import is_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ema_timm.attention import DEFAULT_GROUPS, EmaAttn, largest_group_count

MIN_EXPANDED_WIDTH = 145
"""MobileNetV2 blocks below this expanded width get no EMA attention (the authors' fork)."""

_STAGE = re.compile(r"(?:^|\.)(?:layer|blocks[._])(\d+)(?=[._])")


class Slot(NamedTuple):
    """A place for EMA attention in a network.

    Attributes:
        path: Dotted name of the block in the network.
        block: The timm block; its attribute ``se`` is the slot.
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


def find_slots(model: nn.Module) -> list[Slot]:
    """All places of the paper's placement in ``model``, filled or empty, in network order."""
    slots = []
    for path, block in model.named_modules():
        stage = _STAGE.findall(f"{path}.")
        if not stage:
            continue
        place = _placement(block)
        if place is not None:
            slots.append(Slot(path, block, int(stage[-1]), *place))
    return slots


def _placement(block: nn.Module) -> tuple[int, tuple[str, ...]] | None:
    """Width of the gated map and the tensors to double, or None where no EMA belongs."""
    if isinstance(block, Bottleneck):
        return block.conv3.out_channels, ("bn3.weight", "bn3.bias")
    if isinstance(block, BasicBlock):
        return block.conv2.out_channels, ("bn2.weight", "bn2.bias")
    if isinstance(block, InvertedResidual) and isinstance(block.conv_pwl, nn.Conv2d):
        if block.conv_pwl.in_channels >= MIN_EXPANDED_WIDTH:
            return block.conv_pwl.in_channels, ("conv_pwl.weight",)
    return None


def add_ema(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> list[Slot]:
    """Put a freshly initialised `EmaAttn` into the slots of ``model``, in place.

    Args:
        model: A timm ResNet or MobileNetV2, or a network that contains one.
        groups: Upper bound for the number of groups of each layer.
        stages: Numbers of the stages that get EMA attention; None is every stage.
        cross_spatial: As in `EmaAttn`.

    Returns:
        The slots that were filled.

    Raises:
        TypeError: If the network has no block of a kind that EMA attention has a place in.
        ValueError: If a slot is taken, or ``stages`` names a stage that has no place.
    """
    slots = find_slots(model)
    if not slots:
        raise TypeError(
            "EMA attention goes into timm's ResNets (BasicBlock, Bottleneck) and MobileNetV2s "
            f"(InvertedResidual wider than {MIN_EXPANDED_WIDTH - 1}), and "
            f"{type(model).__name__} has no such block. For other networks place "
            "ema_timm.EmaAttn(channels) by hand."
        )
    if stages is not None:
        wanted = _stage_numbers(stages)
        have = sorted({slot.stage for slot in slots})
        if not wanted or not wanted <= set(have):
            raise ValueError(
                f"ema_stages must name stages that have a place for EMA attention, {have} in "
                f"this network, got {sorted(wanted)}."
            )
        slots = [slot for slot in slots if slot.stage in wanted]
    for slot in slots:
        if isinstance(slot.block.se, EmaAttn):
            raise ValueError(
                f"Block {slot.path} has EMA attention already. Inject into the plain network."
            )
        if not (slot.block.se is None or isinstance(slot.block.se, nn.Identity)):
            raise ValueError(
                f"Block {slot.path} has an attention layer of its own "
                f"({type(slot.block.se).__name__}). Start from a network without one."
            )
    for slot in slots:
        like = next(slot.block.parameters())
        slot.block.se = EmaAttn(
            slot.channels,
            groups=largest_group_count(slot.channels, groups),
            cross_spatial=cross_spatial,
            device=like.device,
            dtype=like.dtype,
        ).train(slot.block.training)
    return slots


def inject(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> nn.Module:
    """Put EMA attention into a timm ResNet or MobileNetV2 that is already built or fine-tuned.

    Args:
        model: The network; changed in place.
        groups: Upper bound for the number of groups of each layer (where it does not divide a
            width, its largest divisor below is used).
        preserve: Start from weights with which the network computes what it computed before,
            exactly (see `ema_timm.backbones.warm_start`).
        stages: Numbers of the stages that get EMA attention, as in their modules' names
            (``layer1`` is 1, ``blocks.3`` is 3); None is the paper's placement.
        cross_spatial: False is the paper's ablation, see `EmaAttn`.

    Returns:
        ``model``.

    Raises:
        TypeError: If the network has no block that EMA attention has a place in.
        ValueError: If a block has an attention layer already, ``stages`` names none that exists,
            or ``preserve`` is asked for where a norm has no affine part to double.
    """
    from ema_timm.backbones.warm_start import require_doubling, start_neutral

    stages = None if stages is None else _stage_numbers(stages)
    if preserve:
        require_doubling(find_slots(model))
    slots = add_ema(model, groups=groups, stages=stages, cross_spatial=cross_spatial)
    if preserve:
        start_neutral(slots)
    _rename(model, groups, stages, cross_spatial)
    return model


def _rename(
    model: nn.Module, groups: int, stages: frozenset[int] | None, cross_spatial: bool
) -> None:
    """Let a saved config name the network that the weights now belong to."""
    cfg = getattr(model, "pretrained_cfg", None)
    name = f"{cfg.get('architecture')}_ema" if isinstance(cfg, dict) else ""
    if not is_model(name):
        return
    model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": name}
    args = dict(getattr(model, "_model_args", {}))
    if groups != DEFAULT_GROUPS:
        args["ema_groups"] = groups
    if stages is not None:
        args["ema_stages"] = sorted(stages)
    if not cross_spatial:
        args["ema_cross_spatial"] = False
    model._model_args = args


def _stage_numbers(stages: Iterable[int]) -> frozenset[int]:
    if isinstance(stages, int):
        stages = (stages,)
    numbers = tuple(stages)
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in numbers):
        raise TypeError(f"ema_stages must be stage numbers, such as (3, 4), got {stages!r}.")
    return frozenset(numbers)
