"""`placement`: the EMA layers of a network as arguments of `inject`, and back."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ema_timm import hooks
from ema_timm.attention import EmaAttn
from ema_timm.backbones.places import Place, fill
from ema_timm.errors import some

_OPTIONAL = Place._field_defaults


def placement(model: nn.Module) -> dict[str, Any]:
    """The arguments with which `inject` adds the EMA layers of ``model`` to the same network.

    ``ema_timm.inject(fresh, **placement)`` needs no example and gives the names and shapes of
    ``model``, so that ``fresh.load_state_dict(model.state_dict())`` loads strictly. The result is
    JSON.

    Args:
        model: A network with EMA layers, by `inject` or by its timm name.

    Returns:
        ``{"at": {module: {"channels", "groups", "gain", "layout"}}}``, and ``"replace": True`` for
        layers in the place of the module, not after it.

    Raises:
        ValueError: If it has no such layers.
    """
    places: dict[str, Place] = {}
    for name, module in model.named_modules():
        if found := hooks.attached(module):
            places[name] = place_of(module.get_submodule(hooks.CHILD), *found)
    after = {f"{name}.{hooks.CHILD}" for name in places}
    for name, module in model.named_modules():
        # Subclasses, such as rows of a YOLO YAML, belong to what builds them.
        if type(module) is EmaAttn and name and name not in after:
            places[name] = place_of(module, replace=True)
    if not places:
        raise ValueError(
            f"{type(model).__name__} holds no EMA attention layer. Add some with ema_timm.inject."
        )
    return {"at": {name: _described(place) for name, place in places.items()}}


def place_of(layer: nn.Module, layout: str = "NCHW", gain: int = 1, replace: bool = False) -> Place:
    """The place of a layer that is in a network."""
    if not isinstance(layer, EmaAttn):
        raise ValueError(
            f"an EMA layer was replaced by {type(layer).__name__}, as an export does. Give the "
            "network before that."
        )
    return Place(layer.channels, layer.groups, gain, layout, replace, layer.cross_spatial)


def _described(place: Place) -> dict[str, Any]:
    """A place as JSON: all that a layer after a module needs, and what differs from that."""
    always = ("channels", "groups", "gain", "layout")
    entries = place._asdict().items()
    return {key: v for key, v in entries if key in always or v != _OPTIONAL[key]}


def restore(model: nn.Module, at: Mapping[str, Any]) -> dict[str, Place]:
    """Add the layers that `placement` describes, in place.

    Args:
        model: The network without them.
        at: The value of "at" in the result of `placement`.

    Returns:
        The places.

    Raises:
        ValueError: If an entry is wrong, or does not fit the network; nothing is changed.
    """
    if not at:
        raise ValueError(
            "at={} places nothing. Give what ema_timm.placement(model) returns, or a pattern."
        )
    places = {name: _read(name, entry) for name, entry in at.items()}
    missing = [name for name, place in places.items() if not _exists(model, name, place.replace)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no module {some(missing, 3)}, which `at` names. Give the "
            "network that the placement is of."
        )
    new = {name: place for name, place in places.items() if not _has(model, name, place)}
    fill(model, new)
    return places


def _read(name: str, entry: Any) -> Place:
    """One entry of `placement`."""
    known = Place._fields
    if not isinstance(entry, Mapping) or not {"channels", "groups"} <= entry.keys() <= set(known):
        raise ValueError(
            f"at[{name!r}] must give channels and groups, and may give {', '.join(known[2:])}, "
            f"got {entry!r}. Use what ema_timm.placement(model) returns."
        )
    place = Place(**entry)
    numbers = [place.channels, place.groups]
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    flags = all(isinstance(flag, bool) for flag in (place.replace, place.cross_spatial))
    fits = whole and flags and place.channels % place.groups == 0
    if not fits or (place.layout, place.gain) not in hooks.HOOKS:
        raise ValueError(
            f"at[{name!r}] must have groups that divide channels, layout 'NCHW' or 'NHWC' and gain "
            f"1 or 2, got {entry!r}. Use what ema_timm.placement(model) returns."
        )
    return place


def _exists(model: nn.Module, name: str, replace: bool) -> bool:
    """Whether a module is there; for a replacement an attribute without module is enough."""
    if name in dict(model.named_modules(remove_duplicate=False)):
        return bool(name)
    parent, _, last = name.rpartition(".")
    owner = dict(model.named_modules(remove_duplicate=False)).get(parent)
    return replace and bool(name) and owner is not None and hasattr(owner, last)


def _has(model: nn.Module, name: str, place: Place) -> bool:
    """Whether the network builds this very layer itself.

    Raises:
        ValueError: If it has another layer there.
    """
    parent, _, last = name.rpartition(".")
    module = getattr(model.get_submodule(parent), last)
    layer = module if place.replace else getattr(module, hooks.CHILD, None)
    if layer is None or (place.replace and not isinstance(layer, EmaAttn)):
        return False
    if place.replace and place_of(layer, replace=True) == place:
        return True
    raise ValueError(
        f"{name} has EMA attention already, or another attribute {hooks.CHILD!r}. Inject into a "
        "network without."
    )
