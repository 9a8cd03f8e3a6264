"""Converts checkpoints of other code with EMA attention, such as the authors', to timm's names.

The authors' fork of timm names the layer ``blocks.S.B.ema``, other code uses other names; in timm's
blocks it is ``se``. A layer is recognised by its parts (``conv1x1``, ``conv3x3``, ``gn``), so its
name in the block does not matter. Layers outside the blocks, as in YOLO's numbered modules, are
placed by name: ``{"model.7": "layer3.5.se"}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS, largest_group_count
from ema_timm.backbones.slots import Slot, find_slots
from ema_timm.checkpoints.read import Checkpoint, resolve_architecture, unwrap
from ema_timm.errors import UserError, some

_FIRST, _PARTS = "conv1x1.weight", ("conv3x3.weight", "gn.weight")


@dataclass(frozen=True)
class Conversion:
    """Weights under timm's names.

    Attributes:
        architecture: timm's name of the network.
        state: Its weights.
        model_args: What differs from the network's defaults: ``ema_groups``, ``ema_stages``.
        groups: Number of groups of each EMA layer, by the layer's new name.
        unused: Names in the checkpoint that the network does not have.
    """

    architecture: str
    state: dict[str, Tensor]
    model_args: dict
    groups: dict[str, int]
    unused: tuple[str, ...]


def convert(
    content: Mapping, architecture: str, rename: Mapping[str, str] | None = None
) -> Conversion:
    """Rename the weights of a network with EMA attention to timm's names.

    Args:
        content: A state dict, also inside ``state_dict`` or ``model`` and after ``module.``.
        architecture: timm's name of the network, with or without ``_ema``.
        rename: New names for modules, by their names in the checkpoint; a module's parts follow.

    Raises:
        UserError: If there is no EMA layer, or the network has no place for one.
    """
    architecture = ema_name(architecture)
    state = _renamed(unwrap(content), rename or {})
    slots = find_slots(_shapes(architecture))
    places = _places(state, slots, architecture)
    groups = {
        f"{slot.path}.se": slot.channels // state[f"{name}.{_FIRST}"].shape[0]
        for name, slot in places.items()
    }
    moved = _moved(state, {name: f"{slot.path}.se" for name, slot in places.items()})
    args = _model_args(list(places.values()), groups, slots)
    expected = _shapes(architecture, **args).state_dict()
    return Conversion(
        architecture=architecture,
        state={name: tensor for name, tensor in moved.items() if name in expected},
        model_args=args,
        groups=groups,
        unused=tuple(sorted(name for name in moved if name not in expected)),
    )


def convert_checkpoint(
    checkpoint: Checkpoint, model: str = "", rename: Mapping[str, str] | None = None
) -> tuple[Checkpoint, Conversion]:
    """`convert` for a checkpoint that was read from a file.

    Args:
        checkpoint: What `ema_timm.checkpoints.read.read_checkpoint` returns.
        model: timm's name of the network, where the checkpoint does not say it.
        rename: As in `convert`.

    Returns:
        The checkpoint with its weights under timm's names, and the conversion.
    """
    done = convert(checkpoint.state, resolve_architecture(checkpoint, model), rename)
    return replace(checkpoint, state=done.state, architecture=done.architecture), done


def ema_name(architecture: str) -> str:
    """The timm name of a network with EMA attention, given with or without ``_ema``.

    Raises:
        UserError: If there is none.
    """
    for name in (architecture, f"{architecture}_ema"):
        if name.endswith("_ema") and is_model(name):
            return name
    raise UserError(
        f"timm has no {architecture} with EMA attention. Give --model NAME_ema; "
        'timm.list_models("*_ema") lists them.'
    )


def _shapes(architecture: str, **model_args) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(architecture, **model_args)


def _renamed(state: dict[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights under their new names."""
    unknown = [old for old in rename if not any(_inside(name, old) for name in state)]
    if unknown:
        raise UserError(
            f"--rename: the checkpoint has no module {unknown[0]}. Its names begin with "
            f"{some(sorted({name.rsplit('.', 1)[0] for name in state}))}."
        )
    return _moved(state, rename)


def _moved(state: dict[str, Tensor], moves: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights with modules under new names; the innermost module decides."""
    moved = {}
    for name, tensor in state.items():
        old = max((o for o in moves if _inside(name, o)), key=len, default=None)
        moved[name if old is None else moves[old] + name[len(old) :]] = tensor
    return moved


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _find_layers(state: dict[str, Tensor]) -> list[str]:
    """Names of the modules that have the parts of an EMA layer."""
    firsts = [name for name in state if name.endswith(f".{_FIRST}")]
    layers = [name.removesuffix(f".{_FIRST}") for name in firsts]
    layers = [name for name in layers if all(f"{name}.{part}" in state for part in _PARTS)]
    if not layers:
        raise UserError(
            "the checkpoint holds no EMA attention layer: none of its modules has conv1x1, "
            "conv3x3 and gn. A plain network's weights load with timm.create_model(NAME_ema, "
            "pretrained=True, pretrained_cfg_overlay={'file': FILE})."
        )
    return layers


def _places(state: dict, slots: list[Slot], architecture: str) -> dict[str, Slot]:
    """The slot of each EMA layer of the checkpoint, by the layer's name there."""
    layers = _find_layers(state)
    by_path = {slot.path: slot for slot in slots}
    places = {name: _place(name, state, by_path, architecture) for name in layers}
    if len({slot.path for slot in places.values()}) < len(layers):
        raise UserError(
            f"two EMA layers of the checkpoint have the same place: {some(sorted(layers))}. Name "
            "the place of each with --rename OLD=NEW."
        )
    return places


def _place(name: str, state: dict, slots: dict[str, Slot], architecture: str) -> Slot:
    """The place of the EMA layer ``name``: that of its block."""
    slot = slots.get(name.rpartition(".")[0])
    if slot is None:
        raise UserError(
            f"{architecture} has no place for the EMA layer {name}; it has places in "
            f"{some(sorted(slots))}. Name its place with --rename {name}=BLOCK.se, or give another "
            "--model."
        )
    shapes = [tuple(state[f"{name}.{part}"].shape) for part in (_FIRST, *_PARTS)]
    n = shapes[0][0]
    if shapes != [(n, n, 1, 1), (n, n, 3, 3), (n,)] or slot.channels % n:
        raise UserError(
            f"the EMA layer {name} has shapes {shapes}, but {slot.path} of {architecture} has "
            f"{slot.channels} channels, which must be a multiple of its width. Check --model."
        )
    return slot


def _model_args(filled: list[Slot], groups: dict[str, int], slots: list[Slot]) -> dict:
    """The arguments with which the network has these layers.

    Args:
        filled: Slots that have a layer in the checkpoint.
        groups: The number of groups of each layer, by its new name.
        slots: All slots of the network.
    """
    bound = _bound(filled, groups)
    args = {} if bound == DEFAULT_GROUPS else {"ema_groups": bound}
    stages = {slot.stage for slot in filled}
    lacking = [s.path for s in slots if s.stage in stages and f"{s.path}.se" not in groups]
    if lacking:
        raise UserError(
            f"the checkpoint has EMA layers only in some blocks of a stage: {some(lacking)} have "
            "none. Build the network by hand with ema_timm.EmaAttn(channels, groups=...)."
        )
    if len(filled) < len(slots):
        args["ema_stages"] = sorted(stages)
    return args


def _bound(filled: list[Slot], groups: dict[str, int]) -> int:
    """The ``ema_groups=`` that gives these numbers of groups."""
    # If any bound gives these groups, the largest of them does.
    for bound in (DEFAULT_GROUPS, max(groups.values())):
        if all(
            largest_group_count(slot.channels, bound) == groups[f"{slot.path}.se"]
            for slot in filled
        ):
            return bound
    raise UserError(
        f"the EMA layers have {sorted(set(groups.values()))} groups, which no single "
        "ema_groups= gives. Build the network by hand with ema_timm.EmaAttn(channels, groups=...)."
    )
