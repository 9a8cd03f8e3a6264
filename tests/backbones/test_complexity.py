"""Multiply-accumulates: the plain network's are PyTorch's count, the layer's those of its form."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from ema_timm import EmaAttn
from ema_timm.backbones.complexity import count_macs, count_parameters


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_without_its_ema_layers_a_network_costs_what_its_plain_twin_does(name):
    with torch.device("meta"):
        plain, ema = timm.create_model(name), timm.create_model(f"{name}_ema")
    counted = count_macs(ema, (3, 224, 224))
    alone = count_macs(plain, (3, 224, 224))
    assert alone["ema"] == alone["ema_definition"] == 0
    assert counted["total"] - counted["ema"] == alone["total"]
    assert count_parameters(ema) > count_parameters(plain)


def test_a_published_count():
    """300 M for MobileNetV2, in the paper's table and in timm's."""
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100")
    assert count_macs(model, (3, 224, 224))["total"] == pytest.approx(300.79e6, rel=1e-3)


def test_the_definition_is_what_pytorch_counts_of_the_reference():
    """Its convolutions; the two matrix products are sums in the reference."""
    layer, (channels, height, width) = EmaAttn(64, groups=8, device="meta"), (64, 14, 10)
    layer.impl = "reference"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.empty(1, channels, height, width, device="meta"))
    products = 2 * channels * height * width
    model = torch.nn.Sequential(layer)
    counted = count_macs(model, (channels, height, width))
    assert counted["ema_definition"] == counter.get_total_flops() // 2 + products
    # By hand, n = 8: 8 * (64 * 24 + 10 * 8 * 140 + 9 * 64).
    assert counted["total"] == counted["ema"] == 106_496


def test_without_cross_spatial_learning_the_whole_convolution_counts():
    layer = EmaAttn(64, groups=8, cross_spatial=False, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.empty(1, 64, 14, 10, device="meta"))
    counted = count_macs(torch.nn.Sequential(layer), (64, 14, 10))
    assert counted["total"] == counted["ema"] == counted["ema_definition"]
    assert counted["total"] == counter.get_total_flops() // 2


def test_the_network_is_left_alone():
    model = timm.create_model("test_resnet_ema").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, (3, 32, 32))
    assert model.training and isinstance(model.layer1[0].se, EmaAttn)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
