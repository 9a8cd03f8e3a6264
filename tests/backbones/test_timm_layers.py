"""timm's own attention layers in EMA attention's slots: the same places, a start that is fair."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.networks import shake
from timm.layers import create_attn
from torch import nn

from ema_timm import EmaAttn
from ema_timm.backbones.slots import find_slots
from ema_timm.backbones.timm_layers import constant_state
from ema_timm.backbones.warm_start import starts_neutral

NEUTRAL = ["se", "ese", "eca", "ecam", "ceca", "cbam", "lcbam", "coord", "scoord", "ela", "strip"]


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "cifar_resnet50", "mobilenetv2_050"])
def test_every_layer_takes_the_same_slots(name):
    plain = timm.create_model(name, device="meta")
    places = {slot.path for slot in find_slots(timm.create_model(f"{name}_ema", device="meta"))}
    assert places
    for attn in ["se", "eca", "cbam", "coord"]:
        model = timm.create_model(f"{name}_ema", attn=attn, device="meta")
        assert {slot.path for slot in find_slots(model) if slot.filled} == places
        kind = type(create_attn(attn, 8))
        assert {
            n.removesuffix(".se") for n, m in model.named_modules() if type(m) is kind
        } == places
        assert not any(isinstance(m, EmaAttn) for m in model.modules())
        kept = {n for n, _ in model.named_parameters() if ".se." not in n}
        assert kept == {n for n, _ in plain.named_parameters()}


def test_one_seed_gives_every_network_the_same_body():
    """What makes a difference paired by seed worth more than one that is not."""
    states = []
    for name, kwargs in [
        ("test_resnet", {}),
        ("test_resnet_ema", {}),
        ("test_resnet_ema", {"attn": "coord"}),
    ]:
        torch.manual_seed(3)
        states.append(timm.create_model(name, num_classes=5, **kwargs).state_dict())
    for key, tensor in states[0].items():
        for other in states[1:]:
            assert torch.equal(other[key], tensor), key


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_start_is_a_constant_exactly_and_training_leaves_it(name, training):
    layer = create_attn(name, 48)
    state, factor = constant_state(layer)
    layer.load_state_dict(state)
    x = torch.randn(3, 48, 6, 5) * 10
    y = layer.train(training)(x)
    assert torch.equal(y * factor, x)
    y.pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    "layer",
    [create_attn("coord", 32, has_skip=True), create_attn("se", 32, gate_layer="tanh"),
     create_attn("gc", 32)],
    ids=["skip", "other-gate", "not-known"],
)  # fmt: skip
def test_a_layer_that_is_no_constant_keeps_its_own_start(layer):
    assert constant_state(layer) is None


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050"])
@pytest.mark.parametrize("attn", ["se", "eca", "cbam", "coord"])
def test_warm_start_computes_what_the_plain_network_computes(name, attn, tmp_path):
    file = tmp_path / "plain.safetensors"
    plain = shake(timm.create_model(name)).eval()
    save_file(plain.state_dict(), file)
    model = timm.create_model(
        f"{name}_ema", attn=attn, pretrained=True, pretrained_cfg_overlay={"file": str(file)}
    ).eval()
    assert starts_neutral(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_difference(model(x), plain(x)) < 1e-5


def test_warm_start_of_a_layer_without_a_neutral_one_leaves_the_body_as_it_was(tmp_path):
    plain = shake(timm.create_model("test_resnet"))
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    overlay = {"file": str(tmp_path / "plain.safetensors")}
    model = timm.create_model(
        "test_resnet_ema", attn="gc", pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert starts_neutral(model) is False
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_trained_weights_of_another_layer_pass_unchanged(tmp_path):
    trained = shake(timm.create_model("test_resnet_ema", attn="se"))
    save_file(trained.state_dict(), tmp_path / "se.safetensors")
    overlay = {"file": str(tmp_path / "se.safetensors")}
    model = timm.create_model(
        "test_resnet_ema", attn="se", pretrained=True, pretrained_cfg_overlay=overlay
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key]), key


@pytest.mark.parametrize(
    "kwargs, error, said",
    [
        ({"attn": "sea"}, ValueError, "got 'sea'"),
        ({"attn": "se", "ema_groups": 8}, ValueError, "attn is 'se'"),
        ({"attn_kwargs": {"rd_ratio": 0.5}}, ValueError, "ema_groups"),
        ({"attn": "bottleneck"}, ValueError, "feature size"),
        ({"attn": "se", "attn_kwargs": {"reduction": 4}}, TypeError, "reduction"),
    ],
)
def test_what_cannot_be_made_is_refused(kwargs, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("test_resnet_ema", **kwargs)


def test_arguments_and_stages_reach_the_layer():
    model = timm.create_model(
        "test_resnet_ema", attn="se", attn_kwargs={"rd_ratio": 0.5}, ema_stages=(3,)
    )
    filled = [slot for slot in find_slots(model) if slot.filled]
    assert [slot.stage for slot in filled] == [3]
    assert filled[0].block.se.fc1.out_channels == 96
    assert isinstance(filled[0].block.se, nn.Module)
