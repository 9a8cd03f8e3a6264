"""The variants of a comparison: one attention layer each, in the same blocks of a network.

``none`` is the plain network, ``ema`` is EMA attention, ``ema-no-cross-spatial`` is the paper's
ablation. Every other name is one of timm's layers, as its ``create_attn`` accepts it. Arguments
follow an ``@``: ``ema@groups=8``, ``se@rd_ratio=0.25,add_maxpool=True``.
"""

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

import timm
from timm.models import get_pretrained_cfg, is_model

from ema_timm.backbones.timm_layers import require_layer
from ema_timm.backbones.warm_start import starts_neutral
from ema_timm.errors import UserError, first_line
from ema_timm.options import pair

NONE = "none"
_EMA = {
    "ema": {},
    "ema-no-cross-spatial": {"ema_cross_spatial": False},
}
_EMA_OPTIONS = ("groups", "stages", "cross_spatial")
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside tuples and lists


class Variant(NamedTuple):
    """One attention layer in a network.

    Args:
        name: Its name in ``--attention`` and in the table.
        model: timm's name of the network with it.
        model_kwargs: Arguments of the network that it needs.
    """

    name: str
    model: str
    model_kwargs: dict

    @property
    def folder(self) -> str:
        """Its name with underscores for characters that do not suit a file name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.name)


def read_variants(names: Sequence[str], model: str) -> list[Variant]:
    """Read the variants of a plain network.

    Args:
        names: The variants, as in ``--attention``.
        model: timm's name of the plain network, with or without a tag.

    Raises:
        UserError: If the network has no place for attention layers, or a variant is unknown.
    """
    _check_model(model)
    variants = [_read(name, model) for name in names]
    if len({variant.folder for variant in variants}) < len(variants):
        raise UserError(f"--attention must name each variant once, got {' '.join(names)}.")
    return variants


def _check_model(model: str) -> None:
    name, _, _ = model.partition(".")
    if ":" in model or not is_model(name):
        raise UserError(
            f"--model must be timm's name of a plain network, such as resnet50, got {model!r}. "
            "Give your own weights as --weights FILE."
        )
    plain = name.removesuffix("_ema")
    if plain != name and is_model(plain):
        raise UserError(
            f"{name} already has EMA attention. Give the plain network: --model "
            f"{model.replace(name, plain, 1).replace('.warm_', '.')}"
        )
    if not is_model(f"{name}_ema"):
        raise UserError(
            f"{name} has no place for attention layers. compare supports timm's ResNets and "
            'MobileNetV2s without attention; timm.list_models("*_ema") lists them.'
        )


def _read(text: str, model: str) -> Variant:
    name, _, given = text.partition("@")
    try:
        options = dict(pair(each) for each in _COMMA.split(given)) if given else {}
        if name == NONE and not options:
            return Variant(text, model, {})
        kwargs = _ema_kwargs(name, options) if name in _EMA else _timm_kwargs(name, options)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"--attention {text}: {first_line(error)}") from error
    return Variant(text, _with_attention(model), kwargs)


def _ema_kwargs(name: str, options: dict) -> dict:
    unknown = [key for key in options if key not in _EMA_OPTIONS]
    if unknown:
        raise ValueError(
            f"EMA attention has the arguments {', '.join(_EMA_OPTIONS)}, got {unknown[0]}."
        )
    return {**_EMA[name], **{f"ema_{key}": value for key, value in options.items()}}


def _timm_kwargs(name: str, options: dict) -> dict:
    if name == NONE:
        raise ValueError("the plain network has no arguments.")
    try:
        require_layer(name)
    except ValueError as error:
        raise ValueError(
            f"there is no layer {name!r}. Use none, {', '.join(_EMA)} or a name that timm's "
            "create_attn accepts, such as se, eca, cbam or coord."
        ) from error
    return {"attn": name, **({"attn_kwargs": options} if options else {})}


def _with_attention(model: str) -> str:
    """The name of the network with attention layers, with the tag for the same weights."""
    name, _, tag = model.partition(".")
    if not tag:
        return f"{name}_ema"
    cfg = get_pretrained_cfg(model)
    return f"{name}_ema.{'warm_' if cfg is not None and cfg.has_weights else ''}{tag}"


def describe_start(variant: Variant, model_kwargs: dict, weights: str | None) -> str:
    """How the weights of a variant's runs were initialised, in words.

    Args:
        variant: The variant.
        model_kwargs: Arguments of its network.
        weights: The initial weights, as ``base`` in results.json names them.
    """
    if weights is None:
        return ""
    if weights == "random start":
        return weights
    if variant.name == NONE:
        return "plain weights"
    neutral = starts_neutral(timm.create_model(variant.model, device="meta", **model_kwargs))
    layer = "identity initialisation" if neutral else "timm's initialisation"
    return f"plain weights, layer with {layer}"
