"""Core ML's converter takes the layer; it predicts on a Mac alone."""

import pytest
import torch
from torch import nn

from ema_timm import EmaAttn
from ema_timm.export import ready_to_export

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("prepared", [False, True])
def test_from_torch_export(prepared):
    coremltools = pytest.importorskip("coremltools")
    model, x = (
        nn.Sequential(nn.Conv2d(3, 32, 3), EmaAttn(32, groups=8)).eval(),
        torch.randn(1, 3, 10, 12),
    )
    program = torch.export.export(ready_to_export(model, image=x) if prepared else model, (x,))
    converted = coremltools.convert(program.run_decompositions({}), skip_model_load=True)
    (function,) = converted.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    kinds = {operation.type for operation in block.operations}
    assert {"conv", "sigmoid", "softmax"} <= kinds
