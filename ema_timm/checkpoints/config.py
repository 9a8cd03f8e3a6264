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

STUB = "configuration_ema_timm.py"
"""The module beside config.json that ``auto_map`` names."""

AUTO_MAP = {"AutoConfig": "configuration_ema_timm.EmaTimmConfig"}


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
    """The config.json of timm's Hub format for ``model``; timm and transformers both load it."""
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
    cfg.update({key: data_config[key] for key in _DATA_KEYS})
    for key in _BASE_ONLY_KEYS:
        cfg.pop(key, None)
    return completed(config)


_DATA_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
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
