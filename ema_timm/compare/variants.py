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

from ema_timm.backbones.rebuild import ANY
from ema_timm.backbones.timm_layers import require_layer
from ema_timm.backbones.warm_start import starts_neutral
from ema_timm.errors import UserError, one_line
from ema_timm.options import pair

NONE = "none"
_EMA = {
    "ema": {},
    "ema-no-cross-spatial": {"cross_spatial": False},
}
_EMA_OPTIONS = ("groups", "stages", "cross_spatial")
_ANY_OPTIONS = ("at", "groups", "cross_spatial")
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
    for number, variant in enumerate(variants):
        for other in variants[:number]:
            if other[1:] == variant[1:]:
                raise UserError(
                    f"--attention {other.name} and {variant.name} are the same network. Leave one "
                    "of them out."
                )
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
    if name == ANY:
        raise UserError(f"--model must be a plain network, got {model}. Give the base of {ANY}.")


def _read(text: str, model: str) -> Variant:
    name, _, given = text.partition("@")
    try:
        options = dict(pair(each) for each in _COMMA.split(given)) if given else {}
        if name == NONE and not options:
            return Variant(text, model, {})
        if not _in_the_paper(model):
            return Variant(text, ANY, {"base": model, **_any_kwargs(name, options, model)})
        kwargs = _ema_kwargs(name, options) if name in _EMA else _timm_kwargs(name, options)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"--attention {text}: {one_line(error)}") from error
    return Variant(text, _with_attention(model), kwargs)


def _in_the_paper(model: str) -> bool:
    """Whether the layers go into the blocks that the paper uses."""
    return is_model(f"{model.partition('.')[0]}_ema")


def _ema_kwargs(name: str, options: dict) -> dict:
    _require_known(options, _EMA_OPTIONS)
    return {f"ema_{key}": value for key, value in {**_EMA[name], **options}.items()}


def _any_kwargs(name: str, options: dict, model: str) -> dict:
    """Arguments of `ANY` for a network of another family; its layers are after the stages."""
    if name not in _EMA:
        raise ValueError(
            f"{model} can be compared with {NONE}, {', '.join(_EMA)}: only ResNets and "
            'MobileNetV2s have places for other layers (timm.list_models("*_ema")).'
        )
    _require_known(options, _ANY_OPTIONS)
    return {"at": "stages", **_EMA[name], **options}


def _require_known(options: dict, known: Sequence[str]) -> None:
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"EMA attention has the arguments {', '.join(known)}, got {unknown[0]}.")


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
