"""A run's folder: the checkpoint in timm's Hub format, and the state that a run resumes from.

Every file is written under a temporary name, flushed to disk and renamed, so that a full disk, a
crash or Ctrl-C never leaves half a file under a final name.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from ema_timm.errors import UserError
from ema_timm.hub.auto_map import AUTO_MAP, STUB, completed, stub_text


class RunFolder:
    """Paths and atomic writes of one run.

    ``model.safetensors``, ``config.json``, ``results.json``, ``README.md`` and ``curves.png`` are
    the checkpoint; ``training/state.pt`` is what ``--resume`` reads (a pickle, never published).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.state_file = self.path / "training" / "state.pt"

    def prepare(self, resume: bool) -> None:
        """Make the folder, or refuse it.

        Raises:
            UserError: If it holds a run and ``resume`` is off, holds none and ``resume`` is on,
                or cannot be written.
        """
        if resume and not self.state_file.is_file():
            raise UserError(
                f"--resume: {self.path} holds no interrupted run ({self.state_file} is missing). "
                "Start it without --resume."
            )
        if not resume and (self.state_file.exists() or (self.path / "model.safetensors").exists()):
            raise UserError(
                f"{self.path} holds a run already. Continue it with --resume, or give another "
                "--output."
            )
        self.make(self.state_file.parent)

    def make(self, folder: Path | None = None) -> None:
        """Make the folder, or one in it, and see that it can be written to.

        Raises:
            UserError: If not.
        """
        folder = folder or self.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}.writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}. Free or unlock it, or give "
                "another folder."
            ) from error

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write one file of the folder by ``write(temporary_path)``, then name it."""
        final = self.path / name
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, content: dict) -> None:
        """Write one JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def save_state(self, state: dict) -> None:
        """Save what a run resumes from: tensors, numbers, strings and containers of them."""
        self.write("training/state.pt", lambda path: torch.save(state, path))

    def load_state(self) -> dict:
        """Read what `save_state` wrote.

        Raises:
            UserError: If the file is damaged.
        """
        try:
            return torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"cannot resume: {self.state_file} is damaged. Remove {self.path} and start anew."
            ) from error

    def save_model(
        self,
        model: nn.Module,
        model_args: dict,
        data_config: dict,
        class_names: list[str] | None,
        descriptions: dict[str, str] | None = None,
    ) -> str:
        """Write ``model.safetensors``, ``config.json`` and what the latter names.

        Args:
            model: A timm classifier.
            model_args: Arguments that rebuild the network, beside its name and classes.
            data_config: Preprocessing of the evaluation, as timm resolves it.
            class_names: Names in the order of the classes, where they are known.
            descriptions: What the names mean, by name, where that is known.

        Returns:
            sha256 of the weights file.
        """
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        # save_file would leave the file readable to its owner alone.
        content = safetensors.torch.save(weights, metadata={"format": "pt"})
        self.write("model.safetensors", lambda path: path.write_bytes(content))
        config = hub_config(model, model_args, data_config, class_names, self.path, descriptions)
        self.save_config(config)
        return sha256(self.path / "model.safetensors")

    def save_config(self, config: dict) -> None:
        """Write ``config.json``, and the stub where ``auto_map`` names it.

        A config.json that says the same already is left as it is, whoever wrote it.
        """
        file = self.path / "config.json"
        if not file.is_file() or json.loads(file.read_text("utf-8")) != config:
            self.write_json("config.json", config)
        if config.get("auto_map") == AUTO_MAP:
            self.write_text(STUB, stub_text())


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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
