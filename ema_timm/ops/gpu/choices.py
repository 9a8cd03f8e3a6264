"""What `ema_timm.tune` chose on a GPU, looked up by "auto": never measured here, never written.

One file for each environment, so that whatever changes the times (GPU, driver, PyTorch, Triton,
the sources of the operator) leaves the old choices behind. CPU tensors never come here.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_timm import __version__
from ema_timm.errors import UserError
from ema_timm.files import cache_folder

_logger = logging.getLogger(__name__)

WISHES = ("auto", "off", "fused")
"""Values of EMA_TIMM_GPU: look up; the closed form always; the fused kernels always."""
LAYOUTS = ("contiguous", "channels_last")
"""Memory formats that are told apart and chosen for."""


class Layer(NamedTuple):
    """One EMA attention layer as a call meets it: all that its time depends on.

    Attributes:
        batch: B.
        channels: C.
        groups: G.
        height: H.
        width: W.
        dtype: Of the feature map, as torch names it.
        layout: Memory format, one of `LAYOUTS`.
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


@dataclass
class Notes:
    """What is noted of one environment.

    Args:
        layers: For each layer what became of each candidate: ``state``, and ``reason``, ``error``
            and ``ms`` where there are such.
        chosen: Who computes a layer; without those for which nobody was chosen.
        barred: Candidates that nobody tries again, each with its reason.
    """

    layers: dict[Layer, dict[str, dict[str, Any]]] = field(default_factory=dict)
    chosen: dict[Layer, str] = field(default_factory=dict)
    barred: dict[str, str] = field(default_factory=dict)


_chosen: dict[tuple, str] = {}
"""By device, shape, groups, dtype, layout and training."""
_otherwise: dict[torch.device, str | None] = {}
"""Devices whose choices are in `_chosen`, and who computes what is not among them."""


def look_up(x: Tensor, groups: int, training: bool) -> str | None:
    """Who shall compute ``x``, by EMA_TIMM_GPU or `ema_timm.tune`; None where nobody was chosen.

    Args:
        x: Feature map on a GPU, (B, C, H, W).
        groups: G.
        training: Whether a backward follows.

    Raises:
        UserError: If EMA_TIMM_GPU says nothing that it can say.
    """
    found = _chosen.get((x.device, x.shape, groups, x.dtype, layout(x), training))
    if found is not None:
        return found
    if x.device not in _otherwise:
        remember(x.device, read(x.device).chosen if wish() == "auto" else {})
        return look_up(x, groups, training)
    return _otherwise[x.device]


def layout(x: Tensor) -> str | None:
    """Which of `LAYOUTS` ``x`` has, if any; contiguous where both."""
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else None


def remember(device: torch.device, chosen: Mapping[Layer, str | None]) -> None:
    """Look up ``chosen`` on ``device`` from now on, in this process; None takes a choice back.

    Raises:
        UserError: If EMA_TIMM_GPU says nothing that it can say.
    """
    asked = wish()
    _otherwise[device] = "fused" if asked == "fused" else None
    if asked != "auto":
        return
    for layer, name in chosen.items():
        if name is None:
            _chosen.pop(_key(device, layer), None)
        else:
            _chosen[_key(device, layer)] = name


def _key(device: torch.device, layer: Layer) -> tuple:
    batch, channels, groups, height, width, dtype, layout, training = layer
    shape = torch.Size((batch, channels, height, width))
    return device, shape, groups, getattr(torch, dtype), layout, training


def give_up(device: torch.device, reason: str) -> None:
    """Never look the fused kernels up on ``device`` again in this process; say once why."""
    _otherwise[device] = None
    for key in [k for k, name in _chosen.items() if k[0] == device and name == "fused"]:
        del _chosen[key]
    pass_over(reason)


@cache
def pass_over(reason: str) -> None:
    """Say once that fused kernels were chosen, and why they do not take some calls."""
    _logger.warning("EMA attention runs its closed form, not the fused kernels: %s.", reason)


def wish() -> str:
    """The value of EMA_TIMM_GPU, one of `WISHES`.

    Raises:
        UserError: If it is none of them.
    """
    value = os.environ.get("EMA_TIMM_GPU") or "auto"
    if value not in WISHES:
        raise UserError(
            f"EMA_TIMM_GPU must be one of {', '.join(WISHES)}, got {value!r}. Set it to one of "
            "them, or unset it."
        )
    return value


def environment(device: torch.device) -> dict[str, str]:
    """All that times on ``device`` depend on beside the layer; choices made elsewhere are not ours.

    Args:
        device: A GPU, or the CPU, whose choices are kept and never looked up.
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


def file_of(environment: Mapping[str, str]) -> Path:
    """Where the choices of an environment are noted."""
    text = json.dumps(environment, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache_folder() / "choices" / f"{name}.json"


def read(device: torch.device) -> Notes:
    """What is noted for ``device`` in the environment as it is now."""
    now = environment(device)
    try:
        return read_file(file_of(now), now)
    except OSError:  # without a home there are no notes either
        return Notes()


def read_file(file: Path, environment: Mapping[str, str]) -> Notes:
    """What ``file`` notes of ``environment``; one that is damaged or another's counts as empty."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["environment"] != environment:
            raise ValueError("it is of another environment")
        return _parse(content)
    except OSError:
        return Notes()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("The choices in %s are ignored: %s.", file, error or type(error).__name__)
        return Notes()


def _parse(content: dict) -> Notes:
    notes = Notes(barred={str(name): str(reason) for name, reason in content["barred"].items()})
    for entry in content["layers"]:
        layer = Layer(**entry["layer"])
        hash(_key(torch.device("cpu"), layer))  # raises where it is no layer
        notes.layers[layer] = {
            name: {**found, "state": str(found["state"])}
            for name, found in entry["candidates"].items()
        }
        if entry["chosen"] is not None:
            notes.chosen[layer] = str(entry["chosen"])
    return notes


@cache
def _sources() -> str:
    """Digest of all of the operator's Python sources: a changed kernel needs new timings."""
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
    """NVIDIA's driver, where Linux tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"
