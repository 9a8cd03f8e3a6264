"""torch-pruning takes whole groups out of EMA layers, and what stays computes what it did."""

import copy
from functools import partial

import pytest
import timm
import torch
from support.networks import shake
from torch import nn

from ema_timm import EmaAttn
from ema_timm.integrations.pruning import pruners, step, whole_groups
from ema_timm.integrations.yolo import EmaAttnRow

tp = pytest.importorskip("torch_pruning", reason="not run: pip install 'ema-timm[friends]'")
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGE = (1, 3, 32, 32)


def pruned(model, ratio=0.3, **options):
    importance = whole_groups(tp.importance.MagnitudeImportance())
    model = copy.deepcopy(model)
    last = list(model.modules())[-1]
    pruner = tp.pruner.BasePruner(
        model, torch.randn(IMAGE), importance, pruning_ratio=ratio,
        customized_pruners=pruners(model), ignored_layers=[last], **options,
    )  # fmt: skip
    step(pruner)
    return model


@pytest.mark.parametrize("kind", [EmaAttn, EmaAttnRow, partial(EmaAttnRow, gain=2)])
def test_a_pruned_network_is_the_masked_network(kind):
    """A channel that is zero leaves its group's gate; a group that is zero leaves nothing."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), norm, kind(32, groups=8), nn.Conv2d(32, 4, 3)
    )
    shake(model).eval()
    norm.weight.data = torch.arange(32.0) + 1  # for the mask to be known by its norm
    norm.bias.data = -norm.weight.data
    small = pruned(model)
    assert (small[2].channels, small[2].groups) == (24, 6)  # int(0.7 * 32) = 22, less no half group
    kept = (small[1].weight.detach() - 1).long()
    assert sorted({int(c) // 4 for c in kept}) == [int(c) // 4 for c in kept[::4]]
    gone = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
    norm.weight.data[gone], norm.bias.data[gone] = 0, 0
    x = torch.randn(2, 3, 16, 20)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-4)  # values of tens


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", ["resnet18_ema", "mobilenetv2_035_ema"])
def test_networks_are_pruned_saved_and_trained(name, across, tmp_path):
    model = shake(timm.create_model(name, num_classes=5)).eval()
    small = pruned(model, global_pruning=across)
    layers = [m for m in small.modules() if isinstance(m, EmaAttn)]
    before = [m for m in model.modules() if isinstance(m, EmaAttn)]
    assert sum(a.groups for a in layers) < sum(b.groups for b in before)
    for a, b in zip(layers, before, strict=True):
        assert a.channels // a.groups == b.channels // b.groups
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    x = torch.randn(2, *IMAGE[1:])
    assert torch.equal(again(x), small(x))
    again.train()(x).sum().backward()
    assert all(
        p.grad is not None
        for m in again.modules()
        if isinstance(m, EmaAttn)
        for p in m.parameters()
    )


def test_a_part_of_a_group_is_refused():
    layer = EmaAttn(32, groups=8)
    pruner = pruners(layer)[EmaAttn]
    with pytest.raises(ValueError, match="whole groups of 4 channels, got 2 channels of 1 groups"):
        pruner.prune_out_channels(layer, [0, 1])


def test_layers_without_cross_spatial_learning_are_refused():
    layer = EmaAttn(32, groups=8, cross_spatial=False)
    with pytest.raises(ValueError, match=r"0 is an EMA layer without.*cross_spatial=True"):
        pruners(nn.Sequential(layer))
