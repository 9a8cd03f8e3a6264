"""What a result depends on: versions, the device, and which implementations can run on it."""

import os
import platform
from pathlib import Path

import timm
import torch

from ema_timm import __version__
from ema_timm.errors import UserError, sentence
from ema_timm.ops.cpu import library
from ema_timm.ops.gpu.choice_file import read_device
from ema_timm.ops.gpu.choices import gpu_mode
from ema_timm.ops.gpu.fused.available import fused_unavailable


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {
        "ema_timm": __version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def environment() -> dict[str, str]:
    """`versions`, and for each implementation whether and where it runs."""
    cuda = torch.cuda.is_available()
    probe = torch.empty(1, 1, 1, 1, device="cuda" if cuda else "cpu")
    reason = fused_unavailable(probe, probe[0, 0, 0])
    return {
        **versions(),
        "CUDA": torch.cuda.get_device_name() if cuda else "not available",
        "reference": "runs anywhere",
        "closed_form": f"runs anywhere; on the CPU {library.status()}, "
        f"{torch.get_num_threads()} threads",
        "fused": f"cannot run here: {reason}" if reason else "runs",
        **_choices(probe.device),
    }


def _choices(device: torch.device) -> dict[str, str]:
    """What `ema_timm.tune` chose on ``device``, one entry a layer."""
    try:
        mode = gpu_mode()
    except UserError as error:
        mode = str(error)
    records = read_device(device)
    count = (
        f"{len(records.chosen)} layers" if records.chosen else "none; `ema-timm tune` makes them"
    )
    if device.type != "cuda":
        count += "; used only on CUDA"
    return {
        "EMA_TIMM_GPU": mode,
        "choices": count,
        **{f"{name} is not tried": reason for name, reason in records.disabled.items()},
        **{str(layer): name for layer, name in records.chosen.items()},
    }


def machine(device: torch.device) -> dict:
    """The machine that a measurement ran on: name, cores, threads, versions."""
    name = _cpu_name()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return {
        "name": name,
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pick_device(name: str) -> str:
    """The device that ``auto`` stands for: CUDA, then MPS, then the CPU.

    Raises:
        UserError: If the named device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not usable here: {sentence(error)} Use --device auto or cpu."
        ) from error
    return name
