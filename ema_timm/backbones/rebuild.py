"""The timm name and arguments that rebuild a network to which layers were added.

timm saves a network by the architecture in its pretrained cfg and by its ``_model_args``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import is_model
from torch import nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.backbones.placement import placement

PAPER = "paper"
ANY = "ema_any"
"""timm's name for a network with EMA layers, if no other name builds it."""

OWN_ARGUMENTS = ("base", "at", "groups", "preserve", "stages", "cross_spatial", "replace")
"""Arguments of `ANY`; all others are those of the base."""


def saved_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of `ANY` that rebuild ``model``; empty for networks of other names.

    timm saves them itself from 1.0.31 on.
    """
    if model.pretrained_cfg.get("architecture") != ANY:
        return {}
    args = getattr(model, "_model_args", {})
    return {key: args[key] for key in OWN_ARGUMENTS if key in args}


def weights_name(name: str, model_kwargs: Mapping[str, Any]) -> str:
    """The timm name, with its tag, whose weights a network starts from.

    Args:
        name: timm's name of the network.
        model_kwargs: Its arguments.
    """
    return str(model_kwargs.get("base", name)) if name == ANY else name


def record(
    model: nn.Module,
    paper: bool,
    groups: int = DEFAULT_GROUPS,
    stages: Iterable[int] | None = None,
    cross_spatial: bool = True,
) -> None:
    """Set the name and arguments in a timm classifier, so that saved configs rebuild it.

    Args:
        model: A network with layers by `inject`. Only timm's classifiers are changed.
        paper: Whether the layers are in the places of the paper.
        groups: As in `inject`.
        stages: As in `inject`.
        cross_spatial: As in `inject`.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    if not name or not is_model(name):
        return
    args = dict(getattr(model, "_model_args", {}))
    chosen: dict[str, Any] = {} if groups == DEFAULT_GROUPS else {"groups": groups}
    if stages is not None:
        chosen["stages"] = sorted(stages)
    if not cross_spatial:
        chosen["cross_spatial"] = False
    if paper and is_model(f"{name}_ema"):
        name = f"{name}_ema"
        args |= {f"ema_{key}": value for key, value in chosen.items()}
    elif hasattr(model, "get_classifier"):  # else a feature extractor, which is not saved
        base = args["base"] if name == ANY else name
        first = paper and name != ANY
        if name == ANY:
            args = {key: value for key, value in args.items() if key not in OWN_ARGUMENTS}
        args |= {"base": base} | ({"at": PAPER} | chosen if first else placement(model))
        name = ANY
    else:
        return
    model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": name}
    model._model_args = args
