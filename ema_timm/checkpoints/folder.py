"""Writes the files of a checkpoint folder, each of them complete or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ema_timm.checkpoints.config import AUTO_MAP, STUB, hub_config, stub_text
from ema_timm.checkpoints.layout import CONFIG, WEIGHTS
from ema_timm.files import make_writable, sha256, write_whole


def weights_content(model: nn.Module) -> bytes:
    """The content of ``model.safetensors``. save_file would write one that only its owner reads."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(weights, metadata={"format": "pt"})


class CheckpointWriter:
    """Writes the files of one folder.

    ``model.safetensors``, ``config.json`` (with the stub that it may name), ``results.json``,
    ``README.md`` and figures are the checkpoint. Other files in the folder are not touched.

    Args:
        path: The folder; `make` makes it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def make(self) -> None:
        """Make the folder; UserError if it cannot be written to."""
        make_writable(self.path)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write one file of the folder by ``write(temporary_path)``, then name it."""
        write_whole(self.path / name, write)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, content: dict) -> None:
        """Write one JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def save_model(
        self,
        model: nn.Module,
        model_args: dict,
        data_config: dict,
        class_names: list[str] | None,
        descriptions: dict[str, str] | None = None,
    ) -> str:
        """Write ``model.safetensors``, ``config.json`` and the stub that the latter names.

        Args:
            model: A timm classifier.
            model_args: Arguments that rebuild the network, beside its name and classes.
            data_config: Preprocessing of the evaluation, as timm resolves it.
            class_names: Names in the order of the classes, if they are known.
            descriptions: What the names mean, by name, if that is known.

        Returns:
            sha256 of the weights file.
        """
        content = weights_content(model)
        self.write(WEIGHTS, lambda path: path.write_bytes(content))
        config = hub_config(model, model_args, data_config, class_names, self.path, descriptions)
        self.save_config(config)
        return sha256(self.path / WEIGHTS)

    def save_config(self, config: dict) -> None:
        """Write ``config.json``, and the stub if ``auto_map`` names it.

        A config.json with the same content is not written again.
        """
        file = self.path / CONFIG
        if not file.is_file() or json.loads(file.read_text("utf-8")) != config:
            self.write_json(CONFIG, config)
        if config.get("auto_map") == AUTO_MAP:
            self.write_text(STUB, stub_text())
