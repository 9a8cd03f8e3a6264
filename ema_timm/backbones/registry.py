"""How a name enters timm's registry, and how its network is built from timm's own."""

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
from ema_timm.backbones.inject import add_ema, add_timm_layer
from ema_timm.backbones.timm_version import TIMM_VERSION
from ema_timm.backbones.warm_start import warm_start_filter
from ema_timm.files import WEIGHTS


def register(module_name: str, name: str, entrypoint: Callable, cfgs: DefaultCfg) -> None:
    """Register ``entrypoint`` as ``name``, once; a name that timm has itself is left to timm.

    Args:
        module_name: The module that owns the name (``__name__``); timm lists models by it.
        name: Architecture name.
        entrypoint: ``f(pretrained=False, **kwargs)``.
        cfgs: Pretrained cfgs by tag, the default first.
    """
    if is_model(name):
        if not model_entrypoint(name).__module__.startswith("ema_timm."):
            warnings.warn(
                f"timm has a model named {name} of its own; ema-timm leaves it alone.",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    module = sys.modules[module_name]
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module_name
    module.default_cfgs[name] = cfgs
    setattr(module, name, entrypoint)  # so that the entry point pickles by reference
    register_model(entrypoint)


def warm_start_cfgs(plain_name: str) -> DefaultCfg:
    """The pretrained cfgs of a plain timm model, as those of its EMA twin.

    A tag with weights becomes ``warm_<tag>``: the same source repository, licence, normalisation
    and sizes, loaded through the warm start. A tag without weights keeps its name.
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
    """Entry point of ``<plain_name>_ema``: timm's own entry point, then EMA in its blocks.

    Args:
        plain_name: A registered model; its entry point stays the only source of the architecture.
        build: Stands in for `build_ema` where a family differs.
    """
    build = build or build_ema
    plain = model_entrypoint(plain_name)

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        """Build the network; readers see the text below."""
        return build(plain, f"{plain_name}_ema", pretrained, **kwargs)

    entrypoint.__doc__ = (
        f"{plain_name} with EMA attention (arXiv:2305.13563).\n\n"
        "Takes what its plain twin takes, and ``ema_groups`` (at most so many groups, 32),\n"
        "``ema_stages`` (numbers of the stages that get EMA attention; all by default) and\n"
        "``ema_cross_spatial`` (False is the paper's ablation). For comparisons ``attn`` puts one\n"
        'of timm\'s own layers in its place, such as "se"; ``attn_kwargs`` go to that.'
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
    timm's, and see the finished network. Weights of the plain twin pass through the warm start.

    Args:
        plain: timm's entry point of the plain network.
        variant: Registered name of the network with EMA.
        pretrained: Load the weights of the resolved pretrained cfg.
        ema_groups: Upper bound for the number of channel groups.
        ema_stages: Stages that get EMA; None is the paper's placement.
        ema_cross_spatial: False is the paper's ablation, see `ema_timm.EmaAttn`.
        attn: The layer in the slots: "ema", or one of timm's as its ``create_attn`` takes it.
        attn_kwargs: Arguments for a layer of timm's.
        plain_kwargs: Arguments for ``plain`` alone.
        **kwargs: What timm's builder and the plain network take.
    """
    if TIMM_VERSION < (1, 0, 26):
        kwargs["pretrained_cfg"] = _with_named_file(kwargs.get("pretrained_cfg"))
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = _with_checked_weights(variant, kwargs)
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


def _with_named_file(cfg: Any) -> Any:
    """The cfg of a ``local-dir:`` name, with the weights file in place of the folder.

    timm before 1.0.26 unpickles whatever file it finds in the folder, safetensors too.
    """
    if not isinstance(cfg, dict) or cfg.get("source") != "local-dir":
        return cfg
    file = Path(cfg["file"]) / WEIGHTS
    return {**cfg, "source": "", "file": str(file)} if file.is_file() else cfg


def _with_checked_weights(variant: str, kwargs: dict) -> dict | None:
    """The overlay of the pretrained cfg, with a file in place of a repository of the Hub.

    timm would not compare the file with its sha256, and would go on to a pickle where it cannot
    be had. A repository without model.safetensors is left to timm.
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
    """What puts the layers into the plain network.

    Raises:
        ValueError: If arguments are given for a layer that is not put in.
    """
    if attn == "ema":
        if attn_kwargs:
            raise ValueError(
                f"attn_kwargs are for timm's layers, got {attn_kwargs!r} for EMA attention. It "
                "takes ema_groups and ema_cross_spatial."
            )
        return partial(add_ema, groups=groups, stages=stages, cross_spatial=cross_spatial)
    if groups != DEFAULT_GROUPS or not cross_spatial:
        raise ValueError(
            f"ema_groups and ema_cross_spatial are for EMA attention, and attn is {attn!r}. It "
            "takes attn_kwargs."
        )
    return partial(add_timm_layer, name=attn, kwargs=attn_kwargs or {}, stages=stages)


def _network(plain, fill, **kwargs) -> nn.Module:
    model = plain(pretrained=False, **kwargs)
    fill(model)
    return model
