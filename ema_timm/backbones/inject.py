"""Adds EMA attention to the blocks of a timm network, with random or identity initialisation.

timm's own attention layers can take the same places, so that networks can be compared.
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


def inject(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> nn.Module:
    """Add EMA attention to a timm ResNet or MobileNetV2 that is already built or fine-tuned.

    Args:
        model: The network; changed in place.
        groups: Maximum number of groups of each layer. If it does not divide a width, the largest
            divisor below it is used.
        preserve: Initialise the layers so that the outputs stay exactly the same (see
            `ema_timm.backbones.warm_start`).
        stages: Numbers of the stages that get EMA attention, as in their modules' names
            (``layer1`` is 1, ``blocks.3`` is 3); None is the paper's placement.
        cross_spatial: False is the paper's ablation, see `EmaAttn`.

    Returns:
        ``model``.

    Raises:
        TypeError: If the network has no block of a supported kind.
        ValueError: If a block has an attention layer already, a stage does not exist, or
            ``preserve`` is on and a norm has no affine part to double.
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
    """The places in these stages; each stage must have some."""
    if not slots:
        raise TypeError(
            "EMA attention goes into timm's ResNets (BasicBlock, Bottleneck) and MobileNetV2s "
            f"(InvertedResidual wider than {MIN_EXPANDED_WIDTH - 1}), and "
            f"{type(model).__name__} has no such block. In other networks place "
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
    """Raise ValueError for a block that has an attention layer."""
    for slot in slots:
        if isinstance(slot.block.se, EmaAttn):
            raise ValueError(
                f"Block {slot.path} has EMA attention already. Inject into the plain network."
            )
        if slot.filled:
            raise ValueError(
                f"Block {slot.path} has another attention layer "
                f"({type(slot.block.se).__name__}). Give a network without one."
            )


def _rename(
    model: nn.Module, groups: int, stages: frozenset[int] | None, cross_spatial: bool
) -> None:
    """Set the architecture in the network's pretrained cfg, for saved configs."""
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
