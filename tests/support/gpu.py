"""Cases on a GPU: what the tests of the fused kernels and of PyTorch's operators there share."""

import pytest
import torch
from support import oracle

from ema_timm.bench.layer import SHAPES
from ema_timm.ops import EmaWeights

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")

# (B, C, H, W) and G.
NETWORKS = [((2, *shape), 32) for shape in SHAPES.values()]
GRID = [
    *NETWORKS,
    ((2, 96, 112, 112), 32),
    ((1, 256, 200, 334), 32),
    ((2, 64, 7, 9), 64),
    ((1, 128, 33, 31), 1),
    ((1, 99, 20, 20), 3),
    ((2, 32, 1, 50), 4),
    ((2, 32, 50, 1), 4),
    ((2, 32, 1, 1), 4),
]


def on_gpu(shape, groups, dtype, layout, device="cuda", seed=0):
    """`oracle.make_case` with every tensor on ``device``."""
    case = oracle.make_case(shape, groups, dtype, layout, seed)
    tensors = [case.x, *case.weights]
    x, *weights = [t.detach().to(device).requires_grad_() for t in tensors]
    return oracle.Case(x, EmaWeights(*weights), groups, case.grad.to(device))
