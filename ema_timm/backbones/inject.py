"""EMA attention into the slots of a timm network: fresh layers, or a start that changes nothing.

A layer of timm's own goes into the same slots, so that networks can be compared.
"""

from collections.abc import Callable, Iterable

from timm.models import is_model
from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS, EmaAttn, largest_group_count
from ema_timm.backbones.slots import MIN_EXPANDED_WIDTH, Slot, find_slots
from ema_timm.backbones.timm_layers import make_layer, require_layer
from ema_timm.backbones.warm_start import require_doubling, start_neutral


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
    """Put one of timm's own attention layers where `add_ema` puts EMA attention, in place.

    Args:
        model: As in `add_ema`.
        name: The layer, as timm's ``create_attn`` takes it.
        kwargs: What else the layer takes.
        stages: As in `add_ema`.

    Returns:
        The slots that were filled.

    Raises:
        TypeError: As in `add_ema`, and if the layer does not take these arguments.
        ValueError: As in `add_ema`, and if timm has no such layer or cannot make it.
    """
    require_layer(name)
    return _fill(model, lambda channels, like: make_layer(name, channels, kwargs, like), stages)


def _fill(
    model: nn.Module, make: Callable[[int, Tensor], nn.Module], stages: Iterable[int] | None
) -> list[Slot]:
    """Put a layer into the slots of these stages.

    Args:
        model: The network.
        make: Makes the layer for a width, where a tensor is and of its type.
        stages: Numbers of the stages; None is every one.
    """
    slots = _wanted(find_slots(model), model, stages)
    _require_free(slots)
    for slot in slots:
        like = next(slot.block.parameters())
        slot.block.se = make(slot.channels, like).train(slot.block.training)
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
    stages = None if stages is None else _stage_numbers(stages)
    if preserve:
        require_doubling(find_slots(model))
    slots = add_ema(model, groups=groups, stages=stages, cross_spatial=cross_spatial)
    if preserve:
        start_neutral(slots)
    _rename(model, groups, stages, cross_spatial)
    return model


def _wanted(slots: list[Slot], model: nn.Module, stages: Iterable[int] | None) -> list[Slot]:
    """The slots of these stages; there must be some, in every stage that is named."""
    if not slots:
        raise TypeError(
            "EMA attention goes into timm's ResNets (BasicBlock, Bottleneck) and MobileNetV2s "
            f"(InvertedResidual wider than {MIN_EXPANDED_WIDTH - 1}), and "
            f"{type(model).__name__} has no such block. For other networks place "
            "ema_timm.EmaAttn(channels) by hand."
        )
    if stages is None:
        return slots
    wanted = _stage_numbers(stages)
    have = sorted({slot.stage for slot in slots})
    if not wanted or not wanted <= set(have):
        raise ValueError(
            f"ema_stages must name stages that have a place for EMA attention, {have} in "
            f"this network, got {sorted(wanted)}."
        )
    return [slot for slot in slots if slot.stage in wanted]


def _require_free(slots: list[Slot]) -> None:
    """Raise ValueError for a slot that is taken."""
    for slot in slots:
        if isinstance(slot.block.se, EmaAttn):
            raise ValueError(
                f"Block {slot.path} has EMA attention already. Inject into the plain network."
            )
        if slot.filled:
            raise ValueError(
                f"Block {slot.path} has an attention layer of its own "
                f"({type(slot.block.se).__name__}). Start from a network without one."
            )


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
