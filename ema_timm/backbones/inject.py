"""Adds EMA attention to an existing network, of timm or any other."""

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.backbones.complexity import count_parameters
from ema_timm.backbones.paper import inject_as_in_the_paper, stage_numbers
from ema_timm.backbones.placement import place_of, restore
from ema_timm.backbones.places import Place, choose, fill, warn_of_losses
from ema_timm.backbones.rebuild import PAPER, record
from ema_timm.hooks import CHILD

_logger = logging.getLogger(__name__)

_WRAPPERS = frozenset(
    "DistributedDataParallel FullyShardedDataParallel FSDPModule DeepSpeedEngine".split()
)
"""Classes, by name, that record the parameters of a network when they wrap it."""


def inject(
    model: nn.Module,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
    *,
    at: str | Sequence[str] | Mapping[str, Any] = PAPER,
    example: Any = None,
    replace: bool = False,
) -> nn.Module:
    """Add EMA attention to an existing network, which may be fine-tuned.

    The outputs stay the same to the last bit until you train, unless ``replace`` is on or
    ``preserve`` is off. Existing parameters keep their names. Each layer runs once in a forward.
    The places are logged as INFO.

    Args:
        model: The network; changed in place.
        groups: Maximum number of groups of each layer. If it does not divide a width, the largest
            divisor below it is used.
        preserve: Initialise the layers so that the outputs stay the same (see
            `ema_timm.backbones.warm_start`). False leaves fresh random weights.
        stages: Only with ``at="paper"``: numbers of the stages that get EMA attention, as in their
            modules' names (``layer1`` is 1, ``blocks.3`` is 3); None is all.
        cross_spatial: False is the paper's ablation, see `EmaAttn`.
        at: Where the layers go:

            - "paper", in the blocks of timm's ResNets and MobileNetV2s, as in the paper;
            - "stages", after the last block of each stage of a timm network;
            - "se", after each SE layer or other gate of a map;
            - a pattern over names of modules, or a list of patterns: after each module that
              matches. ``*`` is one name between dots: "layer1.*". Of an ``nn.Sequential`` the last
              module is used;
            - what `ema_timm.placement` gave as ``at``.
        example: An input that the network takes: a tensor, a tuple of positional arguments or a
            dict of keyword arguments. The network runs once, in evaluation mode. timm networks
            need none.
        replace: Put the layers in the place of the modules, which changes the outputs.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a network or is scripted, or ``at`` is "paper" and it has no
            block of a supported kind.
        ValueError: If a module cannot take a layer or has one already, nothing matches, a stage
            does not exist, ``preserve`` cannot be met, or the network is wrapped for distributed
            training. The network is then as it was.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be an nn.Module that is not scripted, got {reprlib.repr(model)} "
            f"({type(model).__name__}). Build the network first, and script it afterwards."
        )
    _require_unwrapped(model)
    if isinstance(at, Mapping):
        _refuse_with_mapping(groups, preserve, stages, cross_spatial, example, replace)
        places = restore(model, at)
        preserve = all(place.gain != 1 for place in places.values())
    elif at == PAPER:
        if replace or example is not None:
            raise ValueError(
                "example and replace are not for at='paper', the default. Say where the layers go: "
                "at='stages', at='se' or names of modules, at='layer1.*'."
            )
        stages = None if stages is None else stage_numbers(stages)
        slots = inject_as_in_the_paper(model, groups, preserve, stages, cross_spatial)
        places = {f"{slot.path}.se": place_of(slot.block.se, replace=True) for slot in slots}
    else:
        if stages is not None:
            raise ValueError(f"stages are for at='paper', got at={at!r}. Name modules with at=.")
        _require_patterns(at)
        gain = 2 if preserve else 1
        places = choose(model, at, example, groups, gain, replace, cross_spatial)
        warn_of_losses(model, places)
        fill(model, places)
    _log(model, places, preserve and not replace)
    record(model, at == PAPER, groups, stages, cross_spatial)
    return model


def _require_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for a wrapped network, which would not train or save new layers."""
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if wrappers := names & _WRAPPERS:
            raise ValueError(
                f"{type(model).__name__} is wrapped already ({', '.join(sorted(wrappers))}), which "
                "would leave new layers out, for instance when it averages gradients. Inject into "
                "the network first, then wrap it."
            )


def _require_patterns(at: Any) -> None:
    patterns = [at] if isinstance(at, str) else at
    valid = isinstance(patterns, Sequence) and all(isinstance(p, str) and p for p in patterns)
    if not valid or not patterns:
        raise TypeError(
            f"at must be 'paper', 'stages', 'se', patterns over names of modules such as "
            f"'layer1.*', or what ema_timm.placement gives, got {at!r}."
        )


def _refuse_with_mapping(groups, preserve, stages, cross_spatial, example, replace) -> None:
    """A placement says all that the other arguments could."""
    given = (groups, preserve, stages, cross_spatial, replace)
    if given != (DEFAULT_GROUPS, True, None, True, False) or example is not None:
        raise ValueError(
            "a placement gives the groups, gain and layout of each layer. Give no other arguments "
            "beside at=."
        )


def _log(model: nn.Module, places: Mapping[str, Place], preserve: bool) -> None:
    """Log a table of the layers."""
    rows = []
    for name, place in places.items():
        layer = model.get_submodule(name if place.replace else f"{name}.{CHILD}")
        rows.append((name, place, count_parameters(layer)))
    width = max(len(name) for name in places)
    lines = [
        f"{name:{width}}  {place.channels:>8}  {place.groups:>6}  {count:>10,}"
        for name, place, count in rows
    ]
    _logger.info(
        "EMA attention at %d places of %s, %s parameters; its outputs %s.\n%s\n%s",
        len(places),
        type(model).__name__,
        f"{sum(count for *_, count in rows):,}",
        "stay the same" if preserve else "change",
        f"{'module':{width}}  channels  groups  parameters",
        "\n".join(lines),
    )
