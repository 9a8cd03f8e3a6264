"""Write the checkpoint folder of any checkpoint, in timm's Hub format, without metrics."""

import hashlib
import json
from pathlib import Path

from timm.models import get_pretrained_cfg, is_model
from torch import nn

from ema_timm.backbones.rebuild import weights_name
from ema_timm.checkpoints.config import hub_config
from ema_timm.checkpoints.convert import Conversion, convert_checkpoint
from ema_timm.checkpoints.folder import CheckpointWriter, weights_content
from ema_timm.checkpoints.labels import Labels, check_count, read_labels
from ema_timm.checkpoints.layout import RESULTS, WEIGHTS
from ema_timm.checkpoints.network import check_network, rebuild
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.read import Checkpoint, read_checkpoint
from ema_timm.checkpoints.results import describe, hide_local_paths, public_model_name
from ema_timm.errors import UserError


def write_folder(
    checkpoint: Checkpoint,
    network: nn.Module,
    model_args: dict,
    output: str | Path,
    labels: Labels | None,
    overrides: dict | None = None,
) -> Path:
    """Write a folder: weights, config.json and a results.json without measurements.

    Args:
        checkpoint: Where the weights come from.
        network: The network with its weights.
        model_args: Arguments that rebuild it, beside name and classes.
        output: Folder to write; it must not hold a checkpoint already.
        labels: Names of the classes; None leaves them to the first measurement.
        overrides: Preprocessing of the evaluation by timm's names, over that of the training.

    Raises:
        UserError: If the folder holds a checkpoint or cannot be written.
    """
    settings = {**checkpoint.arguments, **(overrides or {})}
    data = preprocessing(network, model_args, settings, use_test_size=True)
    folder = CheckpointWriter(output)
    if (folder.path / WEIGHTS).exists():
        raise UserError(
            f"{output} holds a checkpoint already. Measure it with ema-timm evaluate {output} "
            "--data-dir DIR, or give another --output."
        )
    folder.make()
    names = labels.names if labels else None
    descriptions = labels.descriptions if labels else None
    folder.save_config(hub_config(network, model_args, data, names, folder.path, descriptions))
    content = weights_content(network)
    digest = hashlib.sha256(content).hexdigest()
    classes = names or [str(index) for index in range(network.num_classes)]
    folder.write_json(RESULTS, describe(network, digest, classes, data) | _origin(checkpoint))
    # Last: a folder with weights is complete, and the next call writes one without again.
    folder.write(WEIGHTS, lambda path: path.write_bytes(content))
    check_network(folder.path)
    return folder.path


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
        The conversion, with the names that were not used.
    """
    checkpoint, done = convert_checkpoint(read_checkpoint(source, averaged), model, rename)
    network, model_args = rebuild(checkpoint, done.architecture, done.model_args)
    names = read_labels(labels) if labels else None
    if names:
        check_count(names, network.num_classes, labels)
    write_folder(checkpoint, network, model_args, output, names)
    return done


def _origin(checkpoint: Checkpoint) -> dict:
    """What is known of the file and of the training, without local paths."""
    known = {"checkpoint": {"file": checkpoint.file.name, "averaged": checkpoint.averaged}}
    if not checkpoint.arguments:
        return known
    known |= {
        "trained_with": "timm train.py",
        "base": _base(checkpoint.arguments),
        "arguments": hide_local_paths(json.loads(json.dumps(checkpoint.arguments, default=str))),
    }
    if checkpoint.epoch:
        known["epoch"] = checkpoint.epoch
    return known


def _base(arguments: dict) -> dict:
    """The initial weights of the training, by its arguments."""
    name = weights_name(str(arguments.get("model")), arguments.get("model_kwargs") or {})
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
    return {
        "model": public_model_name(name),
        "weights": weights,
        "hub_repository": repository,
        "license": licence,
    }
