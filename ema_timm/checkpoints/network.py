"""Networks rebuilt: from a folder's config.json, or from what a training's checkpoint says."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_timm.checkpoints.config import read_config
from ema_timm.checkpoints.layout import CONFIG, WEIGHTS
from ema_timm.checkpoints.read import Checkpoint, resolve_architecture
from ema_timm.checkpoints.weights import check_file, load_checked
from ema_timm.errors import UserError, first_line


def check_network(path: str | Path) -> dict:
    """Read config.json and check model.safetensors against the network that it names.

    Returns:
        The content of config.json.

    Raises:
        UserError: If either is missing or damaged, or they belong to different networks.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):  # names, shapes and types; no memory is used
        expected = build_network(path, config).state_dict()
    check_file(path / WEIGHTS, expected)
    return config


def build_network(path: Path, config: dict) -> nn.Module:
    """The network that a folder's config.json names, without its weights.

    Raises:
        UserError: If timm does not know it or its arguments.
    """
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / CONFIG}: timm {timm.__version__} cannot build {config['architecture']}: "
            f"{first_line(error)} Correct the name and model_args, or install what registers it."
        ) from error


def load_network(path: Path, config: dict) -> nn.Module:
    """The network of a folder that passed `check_network`, with its weights."""
    network = build_network(path, config)
    network.load_state_dict(load_file(path / WEIGHTS))
    return network


def rebuild(
    checkpoint: Checkpoint, model: str = "", model_kwargs: dict | None = None
) -> tuple[nn.Module, dict]:
    """The network of a checkpoint with its weights, and the arguments that rebuild it.

    Args:
        checkpoint: Weights; classes and input channels are read off their shapes.
        model: timm's name of the network, where the checkpoint does not say it.
        model_kwargs: Arguments of the network, over those of the training.

    Raises:
        UserError: If timm cannot build it, or the weights are of another network or not finite.
    """
    name = resolve_architecture(checkpoint, model)
    args = dict(checkpoint.arguments.get("model_kwargs") or {})
    if checkpoint.arguments.get("gp"):
        args["global_pool"] = checkpoint.arguments["gp"]
    args |= model_kwargs or {}
    try:
        with torch.device("meta"):
            probe = timm.create_model(name, **args)
        args |= _channels(probe, checkpoint.state)
        classes = _classes(probe, checkpoint)
        network = timm.create_model(name, num_classes=classes, **args)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot build {name} with {args}: {first_line(error)}") from error
    load_checked(network, checkpoint.state, checkpoint.file)
    return network, args


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
            f"{checkpoint.file} holds no classifier ({head}.weight), and accuracy needs one. Give "
            "a checkpoint of a classifier, and its own --model."
        )
    return weight.shape[0]
