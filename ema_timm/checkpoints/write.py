"""A checkpoint of any origin -> a checkpoint folder in timm's Hub format, not measured yet."""

import json
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.checkpoints.check import WEIGHTS, check_names, check_network, check_tensor
from ema_timm.checkpoints.convert import Conversion, convert_checkpoint
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.labels import Labels, check_count, read_labels
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.read import Checkpoint, read_checkpoint, resolve_architecture
from ema_timm.checkpoints.results import FORMAT, PREPROCESSING
from ema_timm.errors import UserError, first_line

_PATHS = ("data", "data_dir", "output", "resume", "initial_checkpoint", "pretrained_path", "config")


def build_for(
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
    load(network, checkpoint.state, checkpoint.file)
    return network, args


def load(network: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Load weights that must be whole, finite and of this network; UserError where not."""
    expected = network.state_dict()
    check_names(file, set(state), expected)
    for name, tensor in state.items():
        check_tensor(file, name, tensor, expected[name])
    network.load_state_dict(state)


def _channels(probe: nn.Module, state: dict[str, Tensor]) -> dict:
    """Input channels of the weights, where they are not the network's own."""
    name = f"{probe.pretrained_cfg.get('first_conv')}.weight"
    weight, own = state.get(name), probe.state_dict().get(name)
    if weight is None or own is None or weight.ndim != 4 or weight.shape[1] == own.shape[1]:
        return {}
    return {"in_chans": weight.shape[1]}


def _classes(probe: nn.Module, checkpoint: Checkpoint) -> int:
    head = probe.pretrained_cfg.get("classifier")
    weight = checkpoint.state.get(f"{head}.weight")
    if weight is None:
        raise UserError(
            f"{checkpoint.file} holds no classifier ({head}.weight), and accuracy needs one. Give "
            "a checkpoint of a classifier, and its own --model."
        )
    return weight.shape[0]


def write_folder(
    checkpoint: Checkpoint,
    network: nn.Module,
    model_args: dict,
    output: str | Path,
    labels: Labels | None,
    data_config: dict,
) -> Path:
    """Write a folder: weights, config.json and a results.json without measurements.

    Args:
        checkpoint: Where the weights come from.
        network: The network with its weights.
        model_args: Arguments that rebuild it, beside name and classes.
        output: Folder to write; it must not hold a checkpoint already.
        labels: Names of the classes; None leaves them to the first measurement.
        data_config: Preprocessing of the evaluation, as timm resolves it.

    Raises:
        UserError: If the folder holds a checkpoint or cannot be written.
    """
    folder = CheckpointWriter(output)
    if (folder.path / WEIGHTS).exists():
        raise UserError(
            f"{output} holds a checkpoint already. Measure it with ema-timm evaluate {output} "
            "--data-dir DIR, or give another --output."
        )
    folder.make()
    names = labels.names if labels else None
    descriptions = labels.descriptions if labels else None
    digest = folder.save_model(network, model_args, data_config, names, descriptions)
    check_network(folder.path)  # what was written loads
    classes = names or [str(index) for index in range(network.num_classes)]
    results = {
        **describe(network, digest, classes, data_config),
        "checkpoint": {"file": checkpoint.file.name, "averaged": checkpoint.averaged},
        **_training(checkpoint),
    }
    folder.write_json("results.json", results)
    return folder.path


def describe(network: nn.Module, digest: str, classes: list[str], data_config: dict) -> dict:
    """What results.json says of a network before anything is measured.

    Args:
        network: The network.
        digest: sha256 of its weights file.
        classes: Names of the classes, in order.
        data_config: Preprocessing of the evaluation, as timm resolves it.
    """
    return {
        "format": FORMAT,
        "architecture": network.pretrained_cfg["architecture"],
        "task": "image-classification",
        "weights_sha256": digest,
        "parameters": count_parameters(network),
        "macs": count_macs(network, tuple(data_config["input_size"])),
        "classes": classes,
        "input": {key: data_config[key] for key in PREPROCESSING},
    }


def write_converted(
    source: str | Path,
    output: str | Path,
    model: str = "",
    rename: dict[str, str] | None = None,
    labels: str = "",
    averaged: bool = False,
) -> Conversion:
    """Write the folder of a checkpoint that `ema_timm.checkpoints.convert` maps onto timm's names.

    Args:
        source: The checkpoint file.
        output: Folder to write.
        model: timm's name of the network, where the checkpoint does not say it.
        rename: New names of modules, as in `ema_timm.checkpoints.convert.convert`.
        labels: File of class names, as `ema_timm.checkpoints.labels.read_labels` takes it.
        averaged: Take the averaged weights.

    Returns:
        What was done, with the names that were not used.
    """
    checkpoint, done = convert_checkpoint(read_checkpoint(source, averaged), model, rename)
    network, model_args = build_for(checkpoint, done.architecture, done.model_args)
    names = read_labels(labels) if labels else None
    if names:
        check_count(names, network.num_classes, labels)
    data = preprocessing(network, model_args, checkpoint.arguments, use_test_size=True)
    write_folder(checkpoint, network, model_args, output, names, data)
    return done


def _training(checkpoint: Checkpoint) -> dict:
    """What is known of the training, without where its files were."""
    if not checkpoint.arguments:
        return {}
    known = {"trained_with": "timm train.py", "base": _base(checkpoint.arguments)}
    arguments = json.loads(json.dumps(checkpoint.arguments, default=str))
    for key in _PATHS:
        if isinstance(arguments.get(key), str):
            arguments[key] = Path(arguments[key]).name
    known["arguments"] = arguments
    if checkpoint.epoch:
        known["epoch"] = checkpoint.epoch
    return known


def _base(arguments: dict) -> dict:
    """What the training started from, by its arguments."""
    name = str(arguments.get("model"))
    given = arguments.get("initial_checkpoint") or arguments.get("pretrained_path")
    repository = weights = licence = None
    if given:
        weights = Path(str(given)).name
    elif not arguments.get("pretrained"):
        weights = "random start"
    elif name.startswith("hf-hub:"):
        repository = weights = name.removeprefix("hf-hub:").partition("@")[0]
    elif is_model(name.partition(".")[0]) and (cfg := get_pretrained_cfg(name)):
        repository, licence = cfg.hf_hub_id, cfg.license
        weights = repository or "timm's pretrained weights"
    if name.startswith("local-dir:"):
        name = f"local-dir:{Path(name).name}"
    return {"model": name, "weights": weights, "hub_repository": repository, "license": licence}
