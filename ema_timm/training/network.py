"""The network of a run: any timm name, the weights it starts from, and clear refusals."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from timm.models import (
    get_pretrained_cfg,
    is_model,
    is_model_pretrained,
    load_model_config_from_hf,
)
from timm.models._factory import parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn

from ema_timm.backbones.complexity import count_macs
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import HubError, UserError, first_line
from ema_timm.files import WEIGHTS
from ema_timm.hub.fetch import fetch
from ema_timm.training.initial_weights import check_folder, check_start
from ema_timm.training.settings import FinetuneConfig

_WITHOUT_NETWORK = (
    " Without network give the weights as --weights FILE, or start from none with --no-pretrained."
)


@dataclass(frozen=True)
class Network:
    """The network of a run, and what its checkpoint says of it.

    Args:
        model: A timm classifier.
        args: Arguments that rebuild it, beside name and classes.
        classes: Class names in the order of its outputs.
        descriptions: What the classes mean, by name, where that is known.
        base: Where its first weights came from, as results.json has it.
        preprocessing: How images are prepared for it, as timm resolves it.
        macs: Multiply-accumulates of one image, as results.json has them.
    """

    model: nn.Module
    args: dict
    classes: list[str]
    descriptions: dict[str, str] | None
    base: dict
    preprocessing: dict
    macs: dict


def build_network(
    config: FinetuneConfig, classes: list[str], device: torch.device, base: dict | None = None
) -> Network:
    """The network of a run, on its device and ready to train.

    Args:
        config: The run's settings.
        classes: Names of the classes that it will tell apart.
        device: Where it will train.
        base: Where the first weights came from, of a run that continues: it gets all its weights
            from its state, and none are fetched.

    Raises:
        UserError: If it cannot be built as the settings say.
        HubError: If the Hub does not give the weights, or gives them damaged.
    """
    model, args = create_model(config, len(classes), fetch_weights=base is None)
    prepared = preprocessing(model, args, {"img_size": config.img_size or None})
    network = Network(
        model=model,
        args=args,
        classes=classes,
        descriptions=known_descriptions(model, classes),
        base=base or describe_base(model, config),
        preprocessing=prepared,
        macs=count_macs(model, prepared["input_size"]),
    )
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return network


def create_model(
    config: FinetuneConfig, num_classes: int, fetch_weights: bool = True
) -> tuple[nn.Module, dict]:
    """Build the network of a run.

    Args:
        config: The run's settings.
        num_classes: Classes of the new head.
        fetch_weights: Load the pretrained weights that the settings ask for.

    Returns:
        The network, and the arguments that rebuild it beside name and classes.

    Raises:
        UserError: If timm does not know the name or the arguments, or has no such weights, or
            those are of another network.
        HubError: If the Hub does not give them, or gives them damaged.
    """
    kwargs = dict(config.model_kwargs)
    pretrained = wants_pretrained(config) and fetch_weights
    rng = torch.get_rng_state()
    try:
        model_args = {**_saved_model_args(config.model), **kwargs}
        if config.drop_path:
            kwargs["drop_path_rate"] = config.drop_path
        model = timm.create_model(
            config.model,
            pretrained=pretrained,
            num_classes=num_classes,
            pretrained_cfg_overlay=_weights_file(config, pretrained),
            **kwargs,
        )
        if pretrained:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(rng)
                blank = timm.create_model(config.model, num_classes=num_classes, **kwargs)
            check_start(model, blank, _said_of(config))
    except (HfHubHTTPError, HFValidationError, OSError, UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"cannot load the weights of {config.model}: {_sentence(error)}{_WITHOUT_NETWORK}"
        ) from error
    except HubError as error:
        hint = "" if ":" in config.model else _WITHOUT_NETWORK
        raise HubError(f"cannot load {config.model}: {error}{hint}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot build {config.model}: {_explain(error, config.model)}") from error
    return model, {k: v for k, v in model_args.items() if k != "num_classes"}


def wants_pretrained(config: FinetuneConfig) -> bool:
    """Whether a run starts from pretrained weights: as told, else where there are some."""
    if config.pretrained is not None:
        return config.pretrained
    return bool(config.weights) or ":" in config.model or is_model_pretrained(config.model)


def describe_base(model: nn.Module, config: FinetuneConfig) -> dict:
    """Where the weights of a run come from, for its results and card."""
    cfg = model.pretrained_cfg
    repository = None
    if not wants_pretrained(config):
        weights = "random start"
    elif config.weights:
        weights = Path(config.weights).name
    elif config.model.startswith("local-dir:"):
        weights = Path(config.model.removeprefix("local-dir:")).name
    else:
        repository = cfg.get("hf_hub_id")
        weights = repository or cfg.get("url")
    source, _, name = config.model.partition(":")
    return {
        # Which folder of which machine is nobody's business.
        "model": f"local-dir:{Path(name).name}" if source == "local-dir" else config.model,
        "weights": weights,
        "hub_repository": repository,
        "license": cfg.get("license") if repository else None,
    }


def known_descriptions(model: nn.Module, classes: list[str]) -> dict[str, str] | None:
    """What the classes mean, where the base describes every one of them."""
    described = model.pretrained_cfg.get("label_descriptions") or {}
    if not all(name in described for name in classes):
        return None
    return {name: described[name] for name in classes}


def _weights_file(config: FinetuneConfig, wanted: bool) -> dict | None:
    """The overlay of the pretrained cfg that names a file, in place of what timm would fetch."""
    file = config.weights
    if wanted and not file:
        file = _start_of_name(config)
    if file and wanted:
        check_bounds(Path(file))
    return {"file": str(file), "source": ""} if file else None


def _start_of_name(config: FinetuneConfig) -> Path | None:
    """The file that a name stands for, fetched; None leaves it to timm."""
    source, model_id = parse_model_name(config.model)
    cache_dir = config.model_kwargs.get("cache_dir")
    if source == "hf-hub":
        return fetch(model_id, WEIGHTS, cache_dir)
    if source == "local-dir":
        check_folder(Path(model_id))
        return None
    if not is_model(model_id.partition(".")[0]) or "pretrained_cfg" in config.model_kwargs:
        return None
    cfg = get_pretrained_cfg(model_id)
    if cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename or cfg.custom_load or cfg.file:
        return None
    return fetch(cfg.hf_hub_id, WEIGHTS, cache_dir)


def _said_of(config: FinetuneConfig) -> str:
    """What the weights of a start are called where they are refused."""
    return f"--weights {config.weights}" if config.weights else f"what {config.model} names"


def _saved_model_args(name: str) -> dict:
    """The network's arguments in the config.json of a ``hf-hub:`` or ``local-dir:`` name."""
    source, model_id = parse_model_name(name)
    if source == "local-dir":
        return dict(load_model_config_from_path(model_id)[2])
    if source == "hf-hub":
        if fetch(model_id, "config.json") is None:
            raise HubError(f"{model_id} has no config.json: it is not a model of timm.")
        return dict(load_model_config_from_hf(model_id)[2])
    return {}


def _explain(error: Exception, name: str) -> str:
    text = _sentence(error)
    if "Unknown model" in text:
        known = timm.list_models()
        near = get_close_matches(name.partition(".")[0], known, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else 'See timm.list_models("*_ema").'
        return f"timm has no model of that name. {hint}"
    return text


def _sentence(error: Exception) -> str:
    return first_line(error).rstrip(". ") + "."
