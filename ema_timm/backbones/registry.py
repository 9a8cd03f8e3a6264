"""Registers names with timm, and builds their networks from timm's own."""

import dataclasses
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.backbones.paper import add_ema, add_timm_layer
from ema_timm.backbones.timm_version import TIMM_VERSION
from ema_timm.backbones.warm_start import warm_start_filter
from ema_timm.files import WEIGHTS


def register(module_name: str, name: str, entrypoint: Callable, cfgs: DefaultCfg) -> None:
    """Register ``entrypoint`` as ``name``, once, unless timm has a model of that name.

    Args:
        module_name: ``__name__`` of the family's module; timm lists models by it.
        name: Architecture name.
        entrypoint: ``f(pretrained=False, **kwargs)``.
        cfgs: Pretrained cfgs by tag, the default first.
    """
    if is_model(name):
        if not model_entrypoint(name).__module__.startswith("ema_timm."):
            warnings.warn(
                f"timm has its own model {name}; ema-timm does not replace it.",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    module = sys.modules[module_name]
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module_name
    module.default_cfgs[name] = cfgs
    setattr(module, name, entrypoint)  # pickle stores the model function by reference
    register_model(entrypoint)


def warm_start_cfgs(plain_name: str) -> DefaultCfg:
    """The pretrained cfgs of a timm model, for the same network with EMA attention.

    A tag with weights becomes ``warm_<tag>``: the same source repository, licence, normalisation
    and sizes, with identity initialisation of the layers. A tag without weights keeps its name.
    """
    cfgs = DefaultCfg()
    for full_name, cfg in get_arch_pretrained_cfgs(plain_name).items():
        _, _, tag = full_name.partition(".")
        if cfg.has_weights:
            tag = f"warm_{tag}" if tag else "warm"
            note = f"EMA attention, warm start: computes the same function as {full_name}"
            cfg = dataclasses.replace(cfg, notes=(*(cfg.notes or ()), note))
            cfgs.is_pretrained = True
        cfgs.cfgs[tag] = cfg
    cfgs.tags = deque(cfgs.cfgs)
    return cfgs


def ema_entrypoint(plain_name: str, build: Callable | None = None) -> Callable:
    """Model function of ``<plain_name>_ema``: timm's own, then EMA attention in its blocks.

    Args:
        plain_name: A registered model; its model function is the only source of the architecture.
        build: Replaces `build_ema` for families that differ.
    """
    build = build or build_ema
    plain = model_entrypoint(plain_name)

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return build(plain, f"{plain_name}_ema", pretrained, **kwargs)

    entrypoint.__doc__ = (
        f"{plain_name} with EMA attention (arXiv:2305.13563).\n\n"
        f"Arguments: those of {plain_name}, and ``ema_groups`` (maximum number of groups, 32),\n"
        "``ema_stages`` (numbers of the stages with EMA attention; all by default) and\n"
        "``ema_cross_spatial`` (False is the paper's ablation). ``attn`` replaces it by one of\n"
        'timm\'s own layers for comparisons, such as "se", with ``attn_kwargs``.'
    )
    return entrypoint


def build_ema(
    plain: Callable,
    variant: str,
    pretrained: bool,
    *,
    ema_groups: int = DEFAULT_GROUPS,
    ema_stages: Iterable[int] | None = None,
    ema_cross_spatial: bool = True,
    attn: str = "ema",
    attn_kwargs: dict | None = None,
    plain_kwargs: dict | None = None,
    **kwargs,
) -> nn.Module:
    """Build ``variant`` with timm's builder; the network itself comes from ``plain``.

    The pretrained cfg, adaptation of classifier and input channels and the feature wrappers are
    timm's, and get the finished network. Weights without EMA layers get their initialisation.

    Args:
        plain: timm's model function of the network without EMA attention.
        variant: Registered name of the network with EMA.
        pretrained: Load the weights of the resolved pretrained cfg.
        ema_groups: Maximum number of channel groups.
        ema_stages: Stages with EMA attention; None is the paper's placement.
        ema_cross_spatial: False is the paper's ablation, see `ema_timm.EmaAttn`.
        attn: The layer: "ema", or a name of timm's ``create_attn``.
        attn_kwargs: Arguments of a timm layer.
        plain_kwargs: Arguments only for ``plain``.
        **kwargs: Arguments of timm's builder and of ``plain``.
    """
    kwargs["pretrained_cfg"] = with_named_file(kwargs.get("pretrained_cfg"))
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = with_checked_weights(variant, kwargs)
    return build_model_with_cfg(
        partial(
            _network,
            plain,
            _filler(attn, attn_kwargs, ema_groups, ema_cross_spatial, ema_stages),
            **(plain_kwargs or {}),
        ),
        variant,
        pretrained,
        pretrained_filter_fn=warm_start_filter,
        **kwargs,
    )


def with_named_file(cfg: Any) -> Any:
    """The cfg of a ``local-dir:`` name, with the weights file in place of the folder.

    timm before 1.0.26 unpickles whatever file it finds in the folder, safetensors too. With a newer
    timm the cfg is as it was.
    """
    if TIMM_VERSION >= (1, 0, 26) or not isinstance(cfg, dict) or cfg.get("source") != "local-dir":
        return cfg
    file = Path(cfg["file"]) / WEIGHTS
    return {**cfg, "source": "", "file": str(file)} if file.is_file() else cfg


def with_checked_weights(variant: str, kwargs: dict) -> dict | None:
    """The overlay of the pretrained cfg, with a file instead of a repository of the Hub.

    timm does not compare the file with its sha256, and loads a pickle if it cannot get the file. A
    repository without model.safetensors is left to timm.
    """
    from ema_timm.hub.fetch import fetch  # not above: `import timm` would be slower

    overlay = kwargs.get("pretrained_cfg_overlay")
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    local = cfg.file or cfg.state_dict
    if (local and cfg.source != "hf-hub") or not cfg.hf_hub_id or cfg.hf_hub_filename:
        return overlay
    file = fetch(cfg.hf_hub_id, WEIGHTS, kwargs.get("cache_dir"))
    return {**(overlay or {}), "file": str(file), "source": ""} if file else overlay


def _filler(
    attn: str,
    attn_kwargs: dict | None,
    groups: int,
    cross_spatial: bool,
    stages: Iterable[int] | None,
) -> Callable[[nn.Module], object]:
    """The function that adds the layers to a network.

    Raises:
        ValueError: If arguments are given for another layer.
    """
    if attn == "ema":
        if attn_kwargs:
            raise ValueError(
                f"attn_kwargs are for timm's layers, got {attn_kwargs!r} for EMA attention. Use "
                "ema_groups and ema_cross_spatial."
            )
        return partial(add_ema, groups=groups, stages=stages, cross_spatial=cross_spatial)
    if groups != DEFAULT_GROUPS or not cross_spatial:
        raise ValueError(
            f"ema_groups and ema_cross_spatial are for EMA attention, but attn is {attn!r}. Use "
            "attn_kwargs."
        )
    return partial(add_timm_layer, name=attn, kwargs=attn_kwargs or {}, stages=stages)


def _network(plain, fill, **kwargs) -> nn.Module:
    model = plain(pretrained=False, **kwargs)
    fill(model)
    return model
