"""How much a network computes: parameters, and multiply-accumulates of one image."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ema_timm.attention import EmaAttn

CONVENTION = (
    "One image, batch size 1. A multiplication with its addition counts once; convolutions, "
    "linear layers and matrix products count, and nothing else does (norms, activations, pooling, "
    "element-wise products). Papers often call this number FLOPs."
)


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of ``model``."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict:
    """Multiply-accumulates of one image, by PyTorch's counter on shapes alone.

    An EMA attention layer is counted twice: in the closed form, which is what runs, and by the
    paper's definition, which is what other implementations run. With n = C / G channels in each
    of G groups on H × W pixels, beside the 1×1 convolution of both, n²(H + W)G:

    - closed form: 9nHWG for the collapsed 3×3 convolution, nHWG for the votes of the normalised
      branch, 9n²G for the weights of the votes.
    - definition: 9n²HWG for the 3×3 convolution, 2nHWG for the two matrix products.

    Without cross-spatial learning there are no such products and there is no closed form: both
    counts are n²(H + W)G + 9n²HWG.

    Args:
        model: A network; not touched.
        input_size: (C, H, W) of the image.

    Returns:
        ``total`` with EMA attention in the closed form, ``ema`` its part of that,
        ``ema_definition`` what that part would be, ``convention``.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    maps = []  # (n, G, H, W, cross-spatial learning) of each call of an EMA layer
    for name, layer in [(k, m) for k, m in model.named_modules() if isinstance(m, EmaAttn)]:
        twin.set_submodule(name, _Recorder(layer, maps))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, *input_size, device="meta"))
    closed = sum(_closed_form(*shape) for shape in maps)
    definition = sum(_definition(*shape) for shape in maps)
    rest = counter.get_total_flops() // 2
    return {
        "total": rest + closed,
        "ema": closed,
        "ema_definition": definition,
        "convention": CONVENTION,
    }


class _Recorder(nn.Module):
    """Stands in the place of an EMA layer and notes the maps it is given."""

    def __init__(self, layer: EmaAttn, maps: list):
        super().__init__()
        self.groups, self.cross_spatial = layer.groups, layer.cross_spatial
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        """Note the shape of ``x``, (1, C, H, W), and return it as it is."""
        _, channels, height, width = x.shape
        n = channels // self.groups
        self.maps.append((n, self.groups, height, width, self.cross_spatial))
        return x


def _closed_form(n: int, groups: int, height: int, width: int, cross_spatial: bool) -> int:
    if not cross_spatial:
        return _definition(n, groups, height, width, cross_spatial)
    pixels = height * width
    return groups * (n * n * (height + width) + 10 * n * pixels + 9 * n * n)


def _definition(n: int, groups: int, height: int, width: int, cross_spatial: bool) -> int:
    pixels = height * width
    products = 2 * n * pixels if cross_spatial else 0
    return groups * (n * n * (height + width) + 9 * n * n * pixels + products)
