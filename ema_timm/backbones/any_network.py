"""``ema_any``: every timm network, with EMA attention where you choose.

``timm.create_model("ema_any", base="convnext_tiny", at="stages", pretrained=True)`` builds timm's
own network with its own pretrained weights, and adds the layers by `ema_timm.inject`. Checkpoints
record ``base`` and ``at``.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    is_model,
    load_pretrained,
    load_state_dict,
    resolve_pretrained_cfg,
)
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS, EmaAttn
from ema_timm.backbones import registry
from ema_timm.backbones.inject import inject
from ema_timm.backbones.rebuild import ANY
from ema_timm.errors import some

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}

_EXAMPLE = 'timm.create_model("ema_any", base="convnext_tiny", at="stages", pretrained=True)'
_PARAMETERS = ("conv1x1.weight", "conv3x3.weight", "gn.weight")
_DEFAULTS = {
    "groups": DEFAULT_GROUPS,
    "preserve": True,
    "stages": None,
    "cross_spatial": True,
    "replace": False,
}
_FEATURE_ARGUMENTS = ("out_indices", "feature_cls")


def register() -> None:
    """Register the name with timm."""
    cfgs = DefaultCfg(tags=deque([""]), cfgs={"": PretrainedCfg()})
    registry.register(__name__, ANY, ema_any, cfgs)


def ema_any(
    pretrained: bool = False,
    *,
    base: str | None = None,
    at: str | Sequence[str] | Mapping[str, Any] = "stages",
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
    replace: bool = False,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm network with EMA attention (arXiv:2305.13563).

    Args:
        pretrained: Load the weights of the base, or of a checkpoint of this network.
        base: timm's name of the network, with or without a tag.
        at: As in `ema_timm.inject`, also what `ema_timm.placement` gave as ``at``.
        groups: As in `ema_timm.inject`.
        preserve: As in `ema_timm.inject`.
        stages: As in `ema_timm.inject`.
        cross_spatial: As in `ema_timm.inject`.
        replace: As in `ema_timm.inject`.
        features_only: Build a feature extractor.
        **kwargs: Arguments of timm's builder and of the base.

    Raises:
        TypeError: If ``base`` is missing.
        ValueError: If timm has no such network, it cannot take the layers, or the weights hold
            layers at other places.
    """
    require_base(base)
    extractor = {key: kwargs.pop(key) for key in _FEATURE_ARGUMENTS if key in kwargs}
    own = pretrained and _choose_weights(base, kwargs)
    model = timm.create_model(base, pretrained=pretrained and not own, **kwargs)
    inject(
        model,
        groups=groups,
        preserve=preserve,
        stages=stages,
        cross_spatial=cross_spatial,
        at=at,
        replace=replace,
    )
    if own:
        _load(model, kwargs)
    cfg = {**model.pretrained_cfg, "architecture": ANY}
    if features_only:
        model = _features(model, base, kwargs, **extractor)
        cfg = pretrained_cfg_for_features(cfg)
    elif extractor:
        raise TypeError(f"{some(list(extractor))} is for features_only=True. Leave it out.")
    model.pretrained_cfg = model.default_cfg = cfg
    # timm before 1.0.31 records no arguments itself.
    own_args = {"base": base, "at": at, "groups": groups, "preserve": preserve, "stages": stages}
    own_args |= {"cross_spatial": cross_spatial, "replace": replace}
    model._model_args = _recorded(kwargs) | {
        key: value for key, value in own_args.items() if value != _DEFAULTS.get(key, ...)
    }
    return model


def _recorded(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base, without those that say where weights come from and go."""
    loading = ("cache_dir", "device", "dtype")
    return {
        key: value
        for key, value in kwargs.items()
        if key not in loading and not key.startswith("pretrained")
    }


def require_base(base: Any) -> None:
    """Raise TypeError or ValueError, with the line that works, unless ``base`` names a network."""
    if base is None:
        raise TypeError(
            f"ema_any needs the timm network to build as base, such as {_EXAMPLE}. Arguments of a "
            "checkpoint are in its config.json; timm before 1.0.31 does not save them."
        )
    name = base.partition(".")[0] if isinstance(base, str) else ""
    if isinstance(base, str) and any(sign in base for sign in ":/\\"):
        raise ValueError(
            f"base must be a name of timm, which can be built again anywhere, got {base!r}. Use "
            f"ema_timm.inject(timm.create_model({base!r}, pretrained=True), at='stages')."
        )
    if not is_model(name) or name == ANY:
        raise ValueError(
            f"base must be a name of timm.list_models(), got {base!r}. Example: {_EXAMPLE}."
        )


def _choose_weights(base: str, kwargs: dict[str, Any]) -> bool:
    """Whether the weights are of a network with EMA layers, not of the base.

    Args:
        base: timm's name of the network.
        kwargs: Arguments of timm's builder; the weights are set to a file that has been checked.
    """
    name, _, tag = base.partition(".")
    kwargs["pretrained_cfg"] = registry.with_named_file(kwargs.get("pretrained_cfg") or tag or None)
    kwargs["pretrained_cfg_overlay"] = registry.with_checked_weights(name, kwargs)
    cfg = resolve_pretrained_cfg(name, kwargs["pretrained_cfg"], kwargs["pretrained_cfg_overlay"])
    if cfg.source in ("local-dir", "hf-hub"):
        return True
    if cfg.state_dict:
        return _hold_layers(cfg.state_dict)
    return bool(cfg.file) and Path(cfg.file).is_file() and _hold_layers(_names_in(cfg.file))


def _names_in(file: str) -> Iterable[str]:
    if Path(file).suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return load_state_dict(file)


def _hold_layers(names: Iterable[str]) -> bool:
    return bool(_layers_in(names))


def _layers_in(names: Iterable[str]) -> set[str]:
    """Names of the EMA layers whose parameters are among these names."""
    known = set(names)
    first, *others = _PARAMETERS
    layers = {name.removesuffix(f".{first}") for name in known if name.endswith(f".{first}")}
    return {layer for layer in layers if all(f"{layer}.{other}" in known for other in others)}


def _load(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Load the weights of a network with EMA layers."""
    load_pretrained(
        model,
        model.pretrained_cfg,
        num_classes=getattr(model, "num_classes", 0),
        in_chans=kwargs.get("in_chans") or 3,
        filter_fn=_require_same_layers,
        cache_dir=kwargs.get("cache_dir"),
    )


def _require_same_layers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state``, if its EMA layers are those of ``model``.

    With another number of classes timm loads what fits and drops the rest without a message.
    """
    found = _layers_in(state)
    wanted = {name for name, module in model.named_modules() if isinstance(module, EmaAttn)}
    if found != wanted:
        raise ValueError(
            f"the weights hold EMA layers at {some(sorted(found - wanted)) or 'fewer places'}, and "
            f"at= places them at {some(sorted(wanted - found)) or 'fewer places'}. Leave at= out, "
            "so that the checkpoint's own is used."
        )
    for name in sorted(wanted):
        ours, theirs = model.get_submodule(name).gn.weight, state[f"{name}.gn.weight"]
        if ours.shape != theirs.shape:
            channels = model.get_submodule(name).channels
            raise ValueError(
                f"{name} has {channels // len(theirs)} groups in the weights, and "
                f"{channels // len(ours)} by groups=. Leave groups= out, so that the checkpoint's "
                "own is used."
            )
    return state


def _features(
    model: nn.Module,
    base: str,
    kwargs: dict[str, Any],
    out_indices: Sequence[int] | None = None,
    feature_cls: Any = "getter",
) -> nn.Module:
    """A wrapper of timm that returns the maps of the stages, around a network with its weights."""
    if feature_cls not in ("getter", FeatureGetterNet):
        raise ValueError(
            f"feature_cls must be 'getter' for ema_any, got {feature_cls!r}: its layers run inside "
            "the whole network."
        )
    if out_indices is None:
        plain = {k: v for k, v in kwargs.items() if not k.startswith("pretrained")}
        with torch.device("meta"):
            extractor = timm.create_model(base, features_only=True, **plain)
        out_indices = extractor.feature_info.out_indices
    wrapped = FeatureGetterNet(model, out_indices=out_indices)
    for key in ("_traits", "in_chans"):
        if hasattr(model, key):
            setattr(wrapped, key, getattr(model, key))
    return wrapped
