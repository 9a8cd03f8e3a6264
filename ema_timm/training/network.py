"""The network of a run, built from any timm name, with errors that say what to correct."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pickle import UnpicklingError

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from ema_timm.backbones.complexity import count_macs
from ema_timm.checkpoints.bounds import bounded_network, check_arguments, given_arguments
from ema_timm.checkpoints.network import BUILDING_ERRORS, saved_model_args
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.errors import HubError, UserError, sentence
from ema_timm.training.initial_weights import OTHER_NAMES, InitialModel

_OFFLINE = (
    " Offline, give the weights as --weights FILE, or start from random weights with "
    "--no-pretrained."
)


@dataclass(frozen=True)
class RunNetwork:
    """The network of a run, and the metadata for its checkpoint.

    Args:
        model: A timm classifier.
        args: Arguments that rebuild it, besides its name and number of classes.
        classes: Class names in the order of its outputs.
        descriptions: Descriptions of the classes by name, if known.
        base: The entry ``base`` of results.json: where its initial weights come from.
        preprocessing: How its images are prepared, as timm resolves it.
        macs: The entry ``macs`` of results.json: multiply-accumulates of one image.
    """

    model: nn.Module
    args: dict
    classes: list[str]
    descriptions: dict[str, str] | None
    base: dict
    preprocessing: dict
    macs: dict


def build_run_network(
    initial: InitialModel,
    classes: list[str],
    device: torch.device,
    base: dict | None = None,
    *,
    image_settings: dict | None = None,
    drop_path: float = 0.0,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
) -> RunNetwork:
    """Build the network of a run on its device, ready to train.

    Args:
        initial: The network and the weights to start from.
        classes: Class names.
        device: The device to train on.
        base: The entry ``base`` of a run that resumes. Its state holds all weights, so none are
            fetched.
        image_settings: How its images are prepared, by timm's names (``img_size``, ``mean``,
            ``std``, ``interpolation``, ``crop_pct``), where that differs from the network's own.
        drop_path: Stochastic depth rate.
        channels_last: Use channels-last memory format.
        grad_checkpointing: Recompute activations in the backward.

    Raises:
        UserError: If it cannot be built.
        HubError: If the Hub does not provide the weights, or provides damaged ones.
    """
    model, args = create_model(initial, len(classes), drop_path, load_weights=base is None)
    prepared = preprocessing(model, args, image_settings or {})
    described = model.pretrained_cfg.get("label_descriptions") or {}
    network = RunNetwork(
        model=model,
        args=args,
        classes=classes,
        descriptions=(
            {name: described[name] for name in classes}
            if all(name in described for name in classes)
            else None
        ),
        base=base or initial.describe(model),
        preprocessing=prepared,
        macs=_macs(model, initial.name, prepared["input_size"]),
    )
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    return network


def _macs(model: nn.Module, name: str, input_size: tuple[int, ...]) -> dict:
    try:
        return count_macs(model, input_size)
    except BUILDING_ERRORS as error:
        shape = "×".join(map(str, input_size))
        raise UserError(
            f"{name} cannot run on an image of {shape}: {sentence(error)} Correct --img-size or "
            "--model-kwargs."
        ) from error


def create_model(
    initial: InitialModel, num_classes: int, drop_path: float = 0.0, load_weights: bool = True
) -> tuple[nn.Module, dict]:
    """Create the timm model of a run.

    Args:
        initial: The network and the weights to start from.
        num_classes: Classes of the new head.
        drop_path: Stochastic depth rate.
        load_weights: Load the weights that ``initial`` names.

    Returns:
        The model, and the arguments that rebuild it besides its name and number of classes.

    Raises:
        UserError: If timm does not know the name or the arguments, or if the weights do not exist
            or belong to another network.
        HubError: If the Hub does not provide the weights, or provides damaged ones.
    """
    name, kwargs = initial.name, given_arguments(initial.kwargs)
    pretrained = load_weights and initial.loads_weights
    try:
        model_args = {**saved_model_args(name), **kwargs}
        check_arguments(model_args)
        if drop_path:
            kwargs["drop_path_rate"] = drop_path
        build = partial(_build, name, num_classes=num_classes, **kwargs)
        blank = None
        if pretrained:
            with torch.random.fork_rng(devices=[]):
                blank = build()
        overlay = initial.config_overlay(blank)
        model = build(pretrained=pretrained, pretrained_cfg_overlay=overlay)
        if blank is not None:
            initial.check(model, blank)
            model.pretrained_cfg.pop("state_dict", None)
    except (HfHubHTTPError, HFValidationError, OSError, UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"cannot load the weights of {name}: {sentence(error)}{_OFFLINE}"
        ) from error
    except HubError as error:
        raise HubError(f"cannot load {name}: {error}{'' if ':' in name else _OFFLINE}") from error
    except BUILDING_ERRORS as error:
        raise UserError(f"cannot build {name}: {_explain(error, name)}") from error
    return model, {k: v for k, v in model_args.items() if k != "num_classes"}


def _build(name: str, **options) -> nn.Module:
    with bounded_network():
        return timm.create_model(name, **options)


def _explain(error: Exception, name: str) -> str:
    text = sentence(error)
    if "Unknown model" in text:
        known = timm.list_models()
        near = get_close_matches(name.partition(".")[0], known, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else 'See timm.list_models("*_ema").'
        return f"timm has no model of that name. {hint}"
    if "loading state_dict" in text:
        return f"the weights do not fit: {text} {OTHER_NAMES}"
    return text
