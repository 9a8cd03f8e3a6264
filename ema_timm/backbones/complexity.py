"""Parameters of a network, and multiply-accumulates of one image."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ema_timm.attention import EmaAttn
from ema_timm.ops.macs import definition_macs, parallel_macs

CONVENTION = (
    "One image, batch size 1. A multiplication with its addition counts once; convolutions, "
    "linear layers and matrix products count, and nothing else does (norms, activations, pooling, "
    "element-wise products). Papers often call this number FLOPs."
)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of ``model``."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict:
    """Multiply-accumulates of one image, by PyTorch's counter on shapes.

    An EMA attention layer is counted twice: in the closed form, which runs here, and by the paper's
    definition, which other implementations run; `ema_timm.ops.macs` has both formulas. Without
    cross-spatial learning the two are the same.

    Args:
        model: A network; not changed.
        input_size: (C, H, W) of the image.

    Returns:
        ``total`` with EMA attention in the closed form, ``ema`` the part of the EMA layers,
        ``ema_definition`` that part by the definition, ``convention``.
    """
    probe = copy.deepcopy(model).to("meta").eval()
    calls = []  # (layer, H, W) of each call of an EMA layer
    for name, layer in [(k, m) for k, m in model.named_modules() if isinstance(m, EmaAttn)]:
        probe.set_submodule(name, _Recorder(layer, calls))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(torch.empty(1, *input_size, device="meta"))
    closed = sum(layer.macs(1, *size) for layer, *size in calls)
    definition = sum(_definition(layer, *size) for layer, *size in calls)
    rest = counter.get_total_flops() // 2
    return {
        "total": rest + closed,
        "ema": closed,
        "ema_definition": definition,
        "convention": CONVENTION,
    }


class _Recorder(nn.Module):
    """Replaces an EMA layer and records the sizes of its inputs."""

    def __init__(self, layer: EmaAttn, calls: list):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x: Tensor) -> Tensor:
        """Record the size of ``x``, (1, C, H, W), and return ``x``."""
        self.calls.append((self.layer, *x.shape[2:]))
        return x


def _definition(layer: EmaAttn, height: int, width: int) -> int:
    count = definition_macs if layer.cross_spatial else parallel_macs
    return count(layer.groups, layer.channels // layer.groups, height, width)
