"""The file in which `ema_timm.tune` keeps its choices: what it depends on, reading, writing.

There is one file for each `tuning_key`. Whatever changes the times (GPU, driver, PyTorch, Triton,
the operator's sources) changes the key, so an outdated choice is never read.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ema_timm import __version__
from ema_timm.fields import load_json
from ema_timm.files import cache_folder, write_whole

_logger = logging.getLogger(__name__)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Memory formats that choices distinguish, by name."""


class Layer(NamedTuple):
    """One EMA attention layer in one call: everything that its time depends on.

    Attributes:
        batch: B.
        channels: C.
        groups: G.
        height: H.
        width: W.
        dtype: Of the feature map, without "torch.".
        layout: Memory format, a key of `LAYOUTS`.
        training: Whether a backward follows.
    """

    batch: int
    channels: int
    groups: int
    height: int
    width: int
    dtype: str
    layout: str
    training: bool

    def __str__(self) -> str:
        size = "×".join(map(str, (self.batch, self.channels, self.height, self.width)))
        kind = "training" if self.training else "inference"
        return f"{size}, {self.groups} groups, {self.dtype}, {self.layout}, {kind}"

    def key(self, device: torch.device) -> tuple:
        """The key under which a call on ``device`` finds this layer."""
        shape = torch.Size((self.batch, self.channels, self.height, self.width))
        dtype = getattr(torch, self.dtype)
        return device, shape, self.groups, dtype, self.layout, self.training


@dataclass
class Records:
    """The content of one file.

    Args:
        layers: For each layer the result of each candidate: ``state``, and ``reason``, ``error``
            and ``ms`` if there are such.
        chosen: The implementation of each layer; layers without one are not in it.
        disabled: Candidates that are never tried again, each with its reason.
    """

    layers: dict[Layer, dict[str, dict[str, Any]]] = field(default_factory=dict)
    chosen: dict[Layer, str] = field(default_factory=dict)
    disabled: dict[str, str] = field(default_factory=dict)


def tuning_key(device: torch.device) -> dict[str, str]:
    """Everything except the layer that times on ``device`` depend on.

    Args:
        device: A GPU. The CPU has a key too, but its choices are never looked up.
    """
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "",
        "driver": _driver(),
        "cuda": str(torch.version.hip or torch.version.cuda),
        "torch": str(torch.__version__),
        "triton": _triton(),
        "ema_timm": __version__,
        "sources": _sources(),
    }


def file_of(key: Mapping[str, str]) -> Path:
    """The file of a `tuning_key`.

    Raises:
        OSError: If there is no cache folder.
    """
    text = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache_folder() / "choices" / f"{name}.json"


def read_device(device: torch.device) -> Records:
    """The records of ``device`` under its present `tuning_key`."""
    key = tuning_key(device)
    try:
        return read_file(file_of(key), key)
    except OSError:  # without a home folder there are no records either
        return Records()


def read_file(file: Path, key: Mapping[str, str]) -> Records:
    """Read a file. One that is missing, damaged or of another key counts as empty."""
    try:
        content = load_json(file)
        if content["environment"] != key:
            raise ValueError("it was made in another environment")
        return _parse(content)
    except OSError:
        return Records()
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        _logger.warning("The choices in %s are ignored: %s.", file, reason)
        return Records()


def write_file(file: Path, key: Mapping[str, str], records: Records) -> None:
    """Write a file atomically.

    Raises:
        OSError: If it cannot be written.
    """
    layers = [
        {"layer": layer._asdict(), "chosen": records.chosen.get(layer), "candidates": candidates}
        for layer, candidates in records.layers.items()
    ]
    content = {"environment": key, "disabled": records.disabled, "layers": layers}
    text = json.dumps(content, indent=1) + "\n"
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def _parse(content: dict) -> Records:
    disabled = {str(name): str(reason) for name, reason in content["disabled"].items()}
    records = Records(disabled=disabled)
    for entry in content["layers"]:
        layer = Layer(**entry["layer"])
        hash(layer.key(torch.device("cpu")))  # raises if a field has a wrong type
        records.layers[layer] = {
            name: {**found, "state": str(found["state"])}
            for name, found in entry["candidates"].items()
        }
        if entry["chosen"] is not None:
            records.chosen[layer] = str(entry["chosen"])
    return records


@cache
def _sources() -> str:
    """Digest of all Python sources of the operator: a changed kernel needs new times."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@cache
def _triton() -> str:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _driver() -> str:
    """The version of NVIDIA's driver; "unknown" outside Linux."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"
