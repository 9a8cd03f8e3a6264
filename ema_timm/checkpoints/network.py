"""Networks from a name or a folder, and from the checkpoint of a training."""

from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._factory import parse_model_name
from torch import Tensor, nn

from ema_timm.checkpoints.bounds import bounded_network, given_arguments
from ema_timm.checkpoints.config import read_config, read_model_config
from ema_timm.checkpoints.layout import CONFIG, WEIGHTS
from ema_timm.checkpoints.read import Checkpoint, resolve_architecture
from ema_timm.checkpoints.weights import check_file, load_checked
from ema_timm.errors import UserError, sentence, some
from ema_timm.hub.fetch import fetch

BUILDING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What timm raises for a name or arguments that are not those of a network."""


def open_network(source: str | Path, pretrained: bool = True, **options) -> tuple[nn.Module, dict]:
    """The network that a folder or a name stands for.

    Args:
        source: A checkpoint folder (``local-dir:FOLDER`` too), a timm name, or
            ``hf-hub:USER/NAME``.
        pretrained: Load its weights. Those of a folder are checked first, those of the Hub are
            compared with the Hub's hash.
        **options: What timm builds the network with, such as ``scriptable=True``.

    Returns:
        The network, and the arguments that rebuild it, beside its name and classes.

    Raises:
        UserError: If there is no such network, or its weights are damaged or missing.
        HubError: If a download from the Hub fails.
    """
    source = str(source)
    folder = Path(source.removeprefix("local-dir:"))
    if source.startswith("local-dir:") or folder.is_dir():
        config = check_network(folder) if pretrained else read_config(folder)
        build = load_network if pretrained else build_network
        return build(folder, config, **options), config.get("model_args", {})
    try:
        return _open_by_name(source, pretrained, options)
    except (HfHubHTTPError, HFValidationError, OSError, SafetensorError) as error:
        raise UserError(f"cannot load the weights of {source}: {sentence(error)}") from error
    except BUILDING_ERRORS as error:
        near = get_close_matches(source.partition(".")[0], timm.list_models(), n=3)
        hint = f"Did you mean {', '.join(near)}? " if near else ""
        names = "timm.list_pretrained()" if pretrained else "timm.list_models()"
        raise UserError(
            f"there is no checkpoint folder {source}, and timm says: {sentence(error)} {hint}Give "
            f"a folder, a name from {names}, or hf-hub:USER/NAME."
        ) from error


def _open_by_name(source: str, pretrained: bool, options: dict) -> tuple[nn.Module, dict]:
    kind, model_id = parse_model_name(source)
    overlay, model_args = None, {}
    if kind == "hf-hub":
        # timm would not compare the file with the Hub's hash.
        file = fetch(model_id, WEIGHTS) if pretrained else None
        overlay = {"file": str(file), "source": ""} if file else None
        model_args = saved_model_args(source)
    with bounded_network(model_args):
        network = timm.create_model(
            source, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options
        )
    return network, model_args


def saved_model_args(name: str) -> dict:
    """The model arguments in the config.json of a ``hf-hub:`` or ``local-dir:`` name.

    Raises:
        UserError: If there is no such file, or it is damaged.
        HubError: If a download from the Hub fails.
    """
    source, model_id = parse_model_name(name)
    file = None
    if source == "local-dir":
        file = Path(model_id) / CONFIG
    elif source == "hf-hub":
        file = fetch(model_id, CONFIG)
        if file is None:
            raise UserError(
                f"{model_id} has no {CONFIG}: it is not a timm model. Correct the name."
            )
    if file is None:
        return {}
    remedy = f"Correct the name, or the {CONFIG} there."
    return dict(read_model_config(file, remedy).get("model_args") or {})


def check_network(path: str | Path, relabel: bool = False) -> dict:
    """Read config.json and check model.safetensors against the network that it names.

    Args:
        path: The folder.
        relabel: As in `read_config`.

    Returns:
        The content of config.json.

    Raises:
        UserError: If either is missing or damaged, or they belong to different networks.
    """
    path = Path(path)
    config = read_config(path, relabel)
    with torch.device("meta"):  # names, shapes and types; no memory is used
        expected = build_network(path, config).state_dict()
    check_file(path / WEIGHTS, expected)
    return config


def build_network(path: Path, config: dict, **options) -> nn.Module:
    """The network that a folder's config.json names, without its weights.

    Args:
        path: The folder.
        config: Content of its config.json.
        **options: What timm builds the network with.

    Raises:
        UserError: If timm does not know it or its arguments.
    """
    try:
        with bounded_network([config["num_classes"], config.get("model_args")]):
            return timm.create_model(f"local-dir:{path}", pretrained=False, **options)
    except BUILDING_ERRORS as error:
        raise UserError(
            f"{path / CONFIG}: timm {timm.__version__} cannot build {config['architecture']}: "
            f"{sentence(error)} Correct the name and model_args, or install what registers it."
        ) from error


def load_network(path: Path, config: dict, **options) -> nn.Module:
    """The network of a folder that passed `check_network`, with its weights."""
    network = build_network(path, config, **options)
    network.load_state_dict(load_file(path / WEIGHTS))
    return network


class Rebuilt(NamedTuple):
    """The result of `rebuild`.

    Attributes:
        network: The network with its weights.
        model_args: The arguments that rebuild it, beside its name and classes.
        notes: Sentences on how the weights were found in their file.
    """

    network: nn.Module
    model_args: dict
    notes: tuple[str, ...]


def rebuild(checkpoint: Checkpoint, model: str = "", model_kwargs: dict | None = None) -> Rebuilt:
    """The network of a checkpoint with its weights.

    Args:
        checkpoint: Weights; classes and input channels are read off their shapes. A prefix before
            all names is removed.
        model: timm's name of the network, where the checkpoint does not say it.
        model_kwargs: Arguments of the network, over those of the training.

    Raises:
        UserError: If timm cannot build it, or the weights are of another network or not finite.
    """
    name = resolve_architecture(checkpoint, model)
    args = dict(checkpoint.arguments.get("model_kwargs") or {})
    if checkpoint.arguments.get("gp"):
        args["global_pool"] = checkpoint.arguments["gp"]
    args |= given_arguments(model_kwargs or {})
    try:
        with bounded_network(args), torch.device("meta"):
            probe = timm.create_model(name, **args)
        checkpoint = checkpoint.named_as(probe.state_dict())
        args |= _channels(probe, checkpoint.state)
        classes = _classes(probe, checkpoint)
        network = timm.create_model(name, num_classes=classes, **args)
    except BUILDING_ERRORS as error:
        raise UserError(f"cannot build {name} with {args}: {sentence(error)}") from error
    load_checked(network, checkpoint.state, checkpoint.file, name)
    return Rebuilt(network, args, checkpoint.notes)


def _channels(probe: nn.Module, state: dict[str, Tensor]) -> dict:
    """Input channels of the weights, where they are not the network's own."""
    name = f"{probe.pretrained_cfg.get('first_conv')}.weight"
    weight, own = state.get(name), probe.state_dict().get(name)
    if weight is None or own is None or weight.ndim != 4 or weight.shape[1] == own.shape[1]:
        return {}
    return {"in_chans": weight.shape[1]}


def _classes(probe: nn.Module, checkpoint: Checkpoint) -> int:
    """Classes that the weights tell apart."""
    head = probe.pretrained_cfg.get("classifier")
    weight = checkpoint.state.get(f"{head}.weight")
    if weight is None:
        raise UserError(
            f"{checkpoint.file} holds no classifier ({head}.weight), and accuracy needs one. Its "
            f"names are {some(sorted(checkpoint.state), 3)}. Give a checkpoint of a classifier, "
            "and its own --model."
        )
    return weight.shape[0]
