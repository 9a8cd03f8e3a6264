"""Latency of one image in each network of a comparison, measured in turn."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ema_timm.bench.model import inference
from ema_timm.bench.timing import Clock, round_robin
from ema_timm.checkpoints.network import open_network
from ema_timm.environment import machine, pick_device
from ema_timm.errors import UserError, VerificationError, one_line
from ema_timm.export.formats import open_onnx
from ema_timm.export.write import export

_ROUNDS = 20


def latencies(folders: Mapping[str, Path], device: str) -> dict:
    """Time the inference of one image in PyTorch.

    Args:
        folders: A checkpoint folder for each variant.
        device: The device.

    Returns:
        ``machine``, and ``ms``: median, lowest and highest time of the rounds for each variant.
    """
    where = torch.device(pick_device(device))
    calls = {}
    for name, folder in folders.items():
        network, image = _network(folder)
        calls[name] = inference(network.to(where), image.to(where))
    times = round_robin(calls, _ROUNDS, Clock(where), "latency")
    return {"machine": machine(where), "ms": {n: t._asdict() for n, t in times.items()}}


def exported_latencies(folders: Mapping[str, Path]) -> dict:
    """Time the exported networks in ONNX Runtime on the CPU.

    Returns:
        As `latencies`, and ``why_not`` for variants that cannot be exported.
    """
    calls, why_not = {}, {}
    for name, folder in folders.items():
        try:
            run = open_onnx(export(folder, "onnx").path)
        except (UserError, VerificationError) as error:
            why_not[name] = one_line(error)
            continue
        _, image = _network(folder)
        calls[name] = lambda run=run, image=image: run(image)
    where = torch.device("cpu")
    times = round_robin(calls, _ROUNDS, Clock(where), "exported latency") if calls else {}
    ms = {name: timing._asdict() for name, timing in times.items()}
    return {"machine": machine(where), "ms": ms, "why_not": why_not}


def _network(folder: Path) -> tuple[nn.Module, Tensor]:
    """A network, and an image of its input size."""
    network, _ = open_network(folder)
    return network, torch.zeros(1, *network.pretrained_cfg["input_size"])
