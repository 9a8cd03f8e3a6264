"""Places of EMA layers in any network: chosen by ``at``, tried, filled, and listed again."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_timm import hooks
from ema_timm.attention import DEFAULT_GROUPS, EmaAttn, largest_group_count
from ema_timm.backbones.settle import put_module, settled
from ema_timm.backbones.stages import last_child, layout_by_shape, stage_maps
from ema_timm.backbones.trace import Trace, traced, trial
from ema_timm.backbones.warm_start import low_precision_grid, neutral_state
from ema_timm.errors import some

_logger = logging.getLogger(__name__)

STAGES, SE = "stages", "se"

ATTENTION_CLASSES = frozenset(
    "SEModule SqueezeExcite SqueezeExcitation EffectiveSEModule EcaModule CecaModule GlobalContext "
    "SqueezeExciteCl SEWithNorm SELayer GatherExcite CbamModule LightCbamModule CoordAttn "
    "SimpleCoordAttn EfficientLocalAttn StripAttn".split()
)
"""Classes of layers that gate a map, of timm, torchvision and others; by name."""

_ATTENTION_ATTRIBUTES = ("se", "attn", "attn_last", "se_module")


class Place(NamedTuple):
    """An EMA layer in a network.

    Attributes:
        channels: C, the width of the map.
        groups: G; divides C.
        gain: 2 undoes the gate of one half of the identity initialisation; else 1.
        layout: "NCHW", or "NHWC" for maps (B, H, W, C).
        replace: Whether the layer replaces the module. Otherwise it comes after it.
        cross_spatial: As in `EmaAttn`.
    """

    channels: int
    groups: int
    gain: int = 1
    layout: str = "NCHW"
    replace: bool = False
    cross_spatial: bool = True


def choose(
    model: nn.Module,
    at: str | Sequence[str],
    example: Any = None,
    groups: int = DEFAULT_GROUPS,
    gain: int = 2,
    replace: bool = False,
    cross_spatial: bool = True,
) -> dict[str, Place]:
    """The places that ``at`` means, tried in one forward; ``model`` is left as it is.

    Args:
        model: The network.
        at: "stages", "se", a pattern over names of modules, or several patterns.
        example: An input of the network; None runs a copy of a timm network on meta.
        groups: Maximum number of groups of each layer.
        gain: Gain of each layer after a module.
        replace: Put the layers in the place of the modules.
        cross_spatial: As in `EmaAttn`.

    Raises:
        ValueError: If a module cannot take a layer, or there is none.
    """
    subject, example = trial(model, example)
    names = []
    if at != STAGES:
        names = _attention_layers(subject) if at == SE else _matching(subject, at)
        _require_unshared(model, names)
    trace = traced(subject, example)
    if at == STAGES:
        layouts, _ = stage_maps(subject, trace)
    else:
        if not replace:
            names = list(dict.fromkeys(last_child(name, trace.modules) for name in names))
        prefer = getattr(model, "output_fmt", "NCHW")
        layouts = {name: _layout(trace, name, str(prefer), replace) for name in names}
    _require_unshared(model, layouts)
    _require_free(model, layouts)
    layouts = settled(subject, layouts, trace, example, replace)
    places = {}
    for name, layout in layouts.items():
        channels = trace.map_of(name)[1 if layout == "NCHW" else 3]
        count = largest_group_count(channels, groups)
        places[name] = Place(
            channels, count, 1 if replace else gain, layout, replace, cross_spatial
        )
    return places


def _matching(model: nn.Module, at: str | Sequence[str]) -> list[str]:
    """Names of modules that match a pattern; ``*`` is one name between dots."""
    patterns = [at] if isinstance(at, str) else list(at)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found = {p: [name for name in names if _matches(name, p)] for p in patterns}
    for pattern, matching in found.items():
        if not matching:
            alike = [n for n in names if n.count(".") == pattern.count(".")] or names
            raise ValueError(
                f"at={pattern!r} matches no module of {type(model).__name__}, which has "
                f"{some(alike, 6) or 'no modules inside'}. "
                "`*` is one name between dots: 'layer1.*', '*.*.conv2'."
            )
    return [name for name in names if any(name in each for each in found.values())]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _attention_layers(model: nn.Module) -> list[str]:
    """Names of the layers that gate a map, by their class."""
    found = [n for n, m in model.named_modules() if type(m).__name__ in ATTENTION_CLASSES]
    if found:
        return found
    others = [
        f"{type(module).__name__} ({name})"
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _ATTENTION_ATTRIBUTES and not isinstance(module, nn.Identity)
    ]
    seen = f", but {some(others, 2)}, which does more than gate a map" if others else ""
    raise ValueError(
        f"{type(model).__name__} has no SE layer or other gate of a map{seen}. Use at='stages' or "
        "name modules: at='PATTERN'."
    )


def _layout(trace: Trace, name: str, prefer: str, replace: bool) -> str:
    """The layout of a module's output, which must be one map."""
    calls, kind = trace.of(name), type(trace.modules.get(name)).__name__
    fault = None
    if not calls and isinstance(trace.modules.get(name), nn.ModuleList | nn.ModuleDict):
        fault = f"is only a list. Name what it holds: '{name}.*'"
    elif isinstance(trace.modules.get(name), torch.jit.ScriptModule):
        fault = "is TorchScript"
    elif not calls:
        fault = "is not called in a forward"
    elif len(calls) > 1:
        fault = f"is called {len(calls)} times in a forward"
    elif calls[0].shape is None:
        fault = f"returns a {calls[0].kind}, not one map"
    elif len(calls[0].shape) != 4:
        fault = f"returns shape {calls[0].shape}, not a map (B, C, H, W)"
    elif replace and calls[0].given != calls[0].shape:
        fault = f"maps {calls[0].given} to {calls[0].shape}, which EMA attention does not"
    if fault:
        raise ValueError(
            f"{name} ({kind}) cannot take EMA attention: it {fault}. Give a pattern of modules "
            "that run once and return one map."
        )
    shape = calls[0].shape
    square = shape[1] == shape[2] != shape[3]  # in the layout (B, H, W, C)
    by_shape = layout_by_shape(shape, trace.size)
    return prefer if prefer == "NHWC" and not replace and square else by_shape


def _require_unshared(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a module that the network holds twice."""
    known: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known.setdefault(id(module), []).append(name)
    for name in names:
        others = [other for other in known[id(model.get_submodule(name))] if other != name]
        if others:
            raise ValueError(
                f"{name} is shared: it is also {some(others, 2)}. Leave it out of the pattern, or "
                "give each place a module of its own."
            )


def _require_free(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a module that is a layer, has one, or has another child ``ema``."""
    for name in names:
        module = model.get_submodule(name)
        if hasattr(module, hooks.CHILD) or isinstance(module, EmaAttn):
            raise ValueError(
                f"{name} has EMA attention already, or another attribute {hooks.CHILD!r}. Inject "
                "into a network without."
            )


def fill(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Add the layers, in place. Those with gain 2 get the identity initialisation."""
    for name, place in places.items():
        owner = model.get_submodule(name.rpartition(".")[0] if place.replace else name)
        layer = _layer(place, _like(owner, model)).train(owner.training)
        if place.replace:
            put_module(model, name, layer)
        else:
            hooks.attach(owner, layer, place.layout, place.gain)


def _layer(place: Place, like: Tensor) -> EmaAttn:
    layer = EmaAttn(
        place.channels,
        groups=place.groups,
        cross_spatial=place.cross_spatial,
        device=like.device,
        dtype=like.dtype,
    )
    if place.gain != 1:
        grid = low_precision_grid(place.channels // place.groups)
        layer.load_state_dict(neutral_state(layer, grid))
    return layer


def _like(module: nn.Module, model: nn.Module) -> Tensor:
    """A tensor with the device and type of a layer in ``module``."""
    for tensor in (*module.parameters(), *model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor
    raise ValueError(f"{type(model).__name__} has no floating point weights. Use ema_timm.EmaAttn.")


def warn_of_losses(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Log a warning for modules that a later step would replace, with the layer after them."""
    lost: dict[str, list[str]] = {}
    for name, place in places.items():
        module = None if place.replace else model.get_submodule(name)
        step = None
        if callable(getattr(module, "fuse", None)):
            step = "timm's reparameterize_model replaces it"
        elif isinstance(module, nn.Conv2d):
            step = "int8 conversion by torch.ao replaces it"
        elif isinstance(module, _BatchNorm):
            step = "conversion to SyncBatchNorm or timm's freeze replaces it"
        if step:
            lost.setdefault(step, []).append(f"{name} ({type(module).__name__})")
    for step, names in lost.items():
        _logger.warning(
            "%s: a module loses its EMA layer if %s. To keep it, place the layer after the block "
            "that contains the module.",
            some(names, 3),
            step,
        )
    if replaced := [name for name, place in places.items() if place.replace]:
        _logger.warning("EMA layers replace %s: the outputs change.", some(replaced, 3))
