"""config.json: how timm and transformers rebuild a network, and the stub that ``auto_map`` names.

transformers loads a timm folder by itself. If it does not know the architecture, it advises to
upgrade timm, which does not help. With ``trust_remote_code=True`` it imports the module that
``auto_map`` names, and the module says what to install.
"""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from ema_timm.backbones.rebuild import ANY, saved_arguments
from ema_timm.checkpoints.layout import CONFIG, WEIGHTS, read_json, require_kinds
from ema_timm.checkpoints.preprocessing import PREPROCESSING, check_preprocessing
from ema_timm.errors import UserError

STUB = "configuration_ema_timm.py"
"""The module in the folder that ``auto_map`` names."""

AUTO_MAP = {"AutoConfig": "configuration_ema_timm.EmaTimmConfig"}

# True of the initial weights of a training, not of the trained ones. Names and descriptions of the
# classes are at the top level.
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

# How one machine loaded the weights: their source in pretrained_cfg, and the arguments that
# timm.create_model takes for itself. A folder with one of the latter in model_args does not load.
_SOURCE_KEYS = ("file", "url", "hf_hub_id", "hf_hub_filename", "source", "state_dict")
LOADING_ARGS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "device",
    "dtype",
)


def read_config(path: Path) -> dict:
    """Read a folder's config.json in timm's Hub format.

    Raises:
        UserError: If it is missing or damaged, does not name a network and its classes, or has
            preprocessing that no image can go through.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give the folder that holds {WEIGHTS}.")
    file = path / CONFIG
    remedy = "Write the folder again with ema-timm evaluate CHECKPOINT --output FOLDER."
    config = read_json(file, remedy)
    kinds = {"architecture": str, "num_classes": int, "pretrained_cfg": dict}
    names = config.get("label_names")
    if "model_args" in config:
        kinds["model_args"] = dict
    if names is not None:
        kinds["label_names"] = list
    require_kinds(config, kinds, file, remedy)
    check_preprocessing(config["pretrained_cfg"], f"{file}, pretrained_cfg")
    if names is not None and len(names) != config["num_classes"]:
        raise UserError(
            f"{file} has {len(names)} label_names for num_classes {config['num_classes']}. {remedy}"
        )
    return config


def needs_auto_map(architecture: str) -> bool:
    """Whether timm without this package does not know ``architecture``."""
    ours = architecture.endswith("_ema") or architecture == ANY
    return ours or architecture.startswith("cifar_resnet")


def stub_text() -> str:
    """The content of the stub."""
    return resources.files(__package__).joinpath("stub", STUB).read_text("utf-8")


def completed(config: dict) -> dict:
    """``config`` as both timm and transformers load it, with ``auto_map`` if it is needed.

    Entries that say how one machine loaded the weights (`loading_keys`) are removed.
    timm 1.0.31 writes ``num_classes`` into the network's arguments as well as at the top level, and
    transformers then passes it twice. Only at the top level it works for both.
    """
    config = dict(config)
    args = without_loading(config.pop("model_args", {}))
    args.pop("num_classes", None)
    if args:
        config["model_args"] = args
    if "pretrained_cfg" in config:
        cfg = config["pretrained_cfg"]
        config["pretrained_cfg"] = {k: v for k, v in cfg.items() if k not in _SOURCE_KEYS}
    if needs_auto_map(config["architecture"]):
        config["auto_map"] = AUTO_MAP
    return config


def loading_keys(config: dict) -> list[str]:
    """The entries of a config.json that say how one machine loaded the weights."""
    held = {"pretrained_cfg": _SOURCE_KEYS, "model_args": LOADING_ARGS}
    return [f"{part}.{k}" for part, keys in held.items() for k in config.get(part, {}) if k in keys]


def without_loading(model_args: dict) -> dict:
    """Arguments of a network without those that timm.create_model takes for itself."""
    return {k: v for k, v in model_args.items() if k not in LOADING_ARGS}


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
        class_names: Names in the order of the classes, if they are known.
        scratch: Folder in which timm may write a temporary file.
        descriptions: What the names mean, by name, if that is known.
    """
    file = scratch / f".config.{os.getpid()}.tmp"
    try:
        save_config_for_hf(
            model,
            file,
            model_config={"label_names": class_names, "label_descriptions": descriptions},
            model_args={**saved_arguments(model), **model_args},
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
