"""config.json: how timm and transformers rebuild a network, and the stub that ``auto_map`` names.

transformers loads a timm folder by itself. Where it does not know the architecture, it advises to
upgrade timm, which does not help. With ``trust_remote_code=True`` it imports the module that
``auto_map`` names, and that one tells a reader without the plug-in what to install.
"""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from ema_timm.checkpoints.layout import CONFIG, read_json
from ema_timm.checkpoints.preprocessing import PREPROCESSING
from ema_timm.errors import UserError

STUB = "configuration_ema_timm.py"
"""The module beside config.json that ``auto_map`` names."""

AUTO_MAP = {"AutoConfig": "configuration_ema_timm.EmaTimmConfig"}

# True of the weights that training started from, not of those it ended with; names and
# descriptions of classes stand at the top level.
_BASE_ONLY_KEYS = (
    "tag",
    "notes",
    "description",
    "test_input_size",
    "test_crop_pct",
    "test_pool_size",
    "label_offset",
    "label_names",
    "label_descriptions",
    "custom_load",
    "license",
)


def read_config(path: Path) -> dict:
    """Read a folder's config.json in timm's Hub format.

    Raises:
        UserError: If it is missing or damaged, or lacks what names a network and its classes.
    """
    file = path / CONFIG
    remedy = "Write the folder anew with ema-timm evaluate CHECKPOINT --output FOLDER."
    config = read_json(file, remedy)
    for key, kind in (("architecture", str), ("num_classes", int), ("pretrained_cfg", dict)):
        if not isinstance(config.get(key), kind):
            raise UserError(
                f"{file} must hold {key!r} ({kind.__name__}), got {config.get(key)!r}. {remedy}"
            )
    names = config.get("label_names")
    if names is not None and len(names) != config["num_classes"]:
        raise UserError(
            f"{file} has {len(names)} label_names for num_classes {config['num_classes']}. {remedy}"
        )
    return config


def needs_auto_map(architecture: str) -> bool:
    """Whether timm alone does not know ``architecture``."""
    return architecture.endswith("_ema") or architecture.startswith("cifar_resnet")


def stub_text() -> str:
    """The content of the stub."""
    return resources.files(__package__).joinpath("stub", STUB).read_text("utf-8")


def completed(config: dict) -> dict:
    """``config`` as both timm and transformers load it, with ``auto_map`` where it is needed.

    timm 1.0.31 writes ``num_classes`` among the network's arguments as well as at the top level,
    and transformers then passes it twice; at the top level alone it satisfies both.
    """
    config = dict(config)
    args = {k: v for k, v in config.pop("model_args", {}).items() if k != "num_classes"}
    if args:
        config["model_args"] = args
    if needs_auto_map(config["architecture"]):
        config["auto_map"] = AUTO_MAP
    return config


def hub_config(
    model: nn.Module,
    model_args: dict,
    data_config: dict,
    class_names: list[str] | None,
    scratch: Path,
    descriptions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The config.json of timm's Hub format for ``model``; timm and transformers both load it.

    Args:
        model: A timm classifier.
        model_args: Arguments that rebuild the network, beside its name and classes.
        data_config: Preprocessing of the evaluation, as timm resolves it.
        class_names: Names in the order of the classes, where they are known.
        scratch: Folder in which timm may write it first, for a moment.
        descriptions: What the names mean, by name, where that is known.
    """
    file = scratch / f".config.{os.getpid()}.tmp"
    try:
        save_config_for_hf(
            model,
            file,
            model_config={"label_names": class_names, "label_descriptions": descriptions},
            model_args=dict(model_args),
        )
        config = json.loads(file.read_text())
    finally:
        file.unlink(missing_ok=True)
    cfg = config["pretrained_cfg"]
    cfg["num_classes"] = config["num_classes"]
    if tuple(cfg["input_size"]) != tuple(data_config["input_size"]):
        cfg["pool_size"] = None
    cfg.update({key: data_config[key] for key in PREPROCESSING})
    for key in _BASE_ONLY_KEYS:
        cfg.pop(key, None)
    return completed(config)
