"""Fills the places of the paper in a timm network, with random or identity initialisation.

timm's own attention layers can take the same places, so that networks can be compared.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS, EmaAttn, largest_group_count
from ema_timm.backbones.places import choose
from ema_timm.backbones.slots import MIN_EXPANDED_WIDTH, Slot, find_slots, unnumbered_blocks
from ema_timm.backbones.timm_layers import make_layer, require_layer
from ema_timm.backbones.warm_start import require_doubling, start_neutral
from ema_timm.errors import sentence, some


def add_ema(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> list[Slot]:
    """Add an `EmaAttn` with random weights to the blocks of ``model``, in place.

    Args:
        model: A timm ResNet or MobileNetV2, or a network that contains one.
        groups: Maximum number of groups of each layer.
        stages: Numbers of the stages that get EMA attention; None is every stage.
        cross_spatial: As in `EmaAttn`.

    Returns:
        The places of the layers.

    Raises:
        TypeError: If the network has no block of a supported kind.
        ValueError: If a block has an attention layer already, or a stage has no such block.
    """

    def make(channels: int, like: Tensor) -> nn.Module:
        return EmaAttn(
            channels,
            groups=largest_group_count(channels, groups),
            cross_spatial=cross_spatial,
            device=like.device,
            dtype=like.dtype,
        )

    return _fill(model, make, stages)


def add_timm_layer(
    model: nn.Module, name: str, kwargs: dict, stages: Iterable[int] | None = None
) -> list[Slot]:
    """Add one of timm's own attention layers where `add_ema` adds EMA attention, in place.

    Args:
        model: As in `add_ema`.
        name: Name of the layer for timm's ``create_attn``.
        kwargs: Other arguments of the layer.
        stages: As in `add_ema`.

    Returns:
        The places of the layers.

    Raises:
        TypeError: As in `add_ema`, and if the layer does not have these arguments.
        ValueError: As in `add_ema`, and if timm has no such layer or cannot build it.
    """
    require_layer(name)
    return _fill(model, lambda channels, like: make_layer(name, channels, kwargs, like), stages)


def _fill(
    model: nn.Module, make: Callable[[int, Tensor], nn.Module], stages: Iterable[int] | None
) -> list[Slot]:
    """Add a layer to the blocks of these stages.

    Args:
        model: The network.
        make: Builds the layer for a width, with the device and type of a tensor.
        stages: Numbers of the stages; None is all.
    """
    slots = _wanted(find_slots(model), model, stages)
    _require_free(slots)
    for slot in slots:
        like = next(slot.block.parameters())
        slot.block.se = make(slot.channels, like).train(slot.block.training)
    return slots


def inject_as_in_the_paper(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> list[Slot]:
    """`add_ema`, with the identity initialisation if ``preserve``; raises what it raises.

    Raises:
        ValueError: Also if ``preserve`` is on and a norm has no affine part to double.
    """
    if preserve:
        require_doubling(find_slots(model))
    slots = add_ema(model, groups=groups, stages=stages, cross_spatial=cross_spatial)
    if preserve:
        start_neutral(slots)
    return slots


def elsewhere(model: nn.Module) -> str:
    """The line that adds layers to a network whose family the paper does not use."""
    if hasattr(model, "pretrained_cfg"):
        try:
            choose(model, "stages")
            return 'Use ema_timm.inject(model, at="stages"), or name modules: at="PATTERN".'
        except ValueError as error:
            return f"{sentence(error)} In a network of your own, ema_timm.EmaAttn is the layer."
    return (
        'Name the modules that return a map: ema_timm.inject(model, at="PATTERN", example=images). '
        "In a network of your own, ema_timm.EmaAttn(channels) is the layer."
    )


def _require_numbered(slots: list[Slot], model: nn.Module) -> None:
    """Raise TypeError if only some of the blocks are in stages with a number, as in HRNet."""
    others = unnumbered_blocks(model)
    if others:
        raise TypeError(
            f"at='paper' needs all blocks in numbered stages, but {type(model).__name__} has "
            f"{len(others)} of {len(others) + len(slots)} elsewhere ({some(others, 2)}). "
            f"{elsewhere(model)}"
        )


def _wanted(slots: list[Slot], model: nn.Module, stages: Iterable[int] | None) -> list[Slot]:
    """The places in these stages; each stage must have some."""
    if not slots:
        raise TypeError(
            f"at='paper' is for timm's ResNets (BasicBlock, Bottleneck) and MobileNetV2s "
            f"(InvertedResidual wider than {MIN_EXPANDED_WIDTH - 1}), and "
            f"{type(model).__name__} has no such block. {elsewhere(model)}"
        )
    _require_numbered(slots, model)
    if stages is None:
        return slots
    wanted = stage_numbers(stages)
    have = sorted({slot.stage for slot in slots})
    if not wanted or not wanted <= set(have):
        raise ValueError(
            f"ema_stages must name stages that have a place for EMA attention, {have} in "
            f"this network, got {sorted(wanted)}."
        )
    return [slot for slot in slots if slot.stage in wanted]


def _require_free(slots: list[Slot]) -> None:
    """Raise ValueError for a block that has an attention layer."""
    for slot in slots:
        if isinstance(slot.block.se, EmaAttn):
            raise ValueError(
                f"Block {slot.path} has EMA attention already. Inject into the plain network."
            )
        if slot.filled:
            raise ValueError(
                f"Block {slot.path} has another attention layer "
                f"({type(slot.block.se).__name__}). Give a network without one, or replace it: "
                'ema_timm.inject(model, at="se", replace=True).'
            )


def stage_numbers(stages: Iterable[int]) -> frozenset[int]:
    """Numbers of stages, or one number, as a set; TypeError for anything else."""
    if isinstance(stages, int):
        stages = (stages,)
    numbers = tuple(stages)
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in numbers):
        raise TypeError(f"ema_stages must be stage numbers, such as (3, 4), got {stages!r}.")
    return frozenset(numbers)
