"""EMA attention in networks that exist already."""

import copy

import pytest
import timm
import torch
from support.networks import shake

from ema_timm import EmaAttn, inject


def layers(model):
    return [m for m in model.modules() if isinstance(m, EmaAttn)]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50d",
        "resnet50_gn",
        "test_resnet",
        "mobilenetv2_100",
        "efficientnet_lite0",
    ],
)
def test_preserve_keeps_the_function(name):
    plain = shake(timm.create_model(name, num_classes=7)).eval()
    model = inject(copy.deepcopy(plain))
    assert layers(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = plain(x)
        assert torch.equal(model(x), want)


def test_without_preserve_the_layers_start_at_random():
    plain = shake(timm.create_model("resnet18")).eval()
    model = inject(copy.deepcopy(plain), preserve=False)
    x = torch.randn(1, 3, 64, 64)
    assert all(layer.gn.weight.eq(1).all() for layer in layers(model))
    assert torch.equal(model.layer1[0].bn2.weight, plain.layer1[0].bn2.weight)
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x), rtol=1e-2)


def test_returns_the_same_model_with_the_counts_of_the_registered_name():
    model = timm.create_model("resnet18")
    assert inject(model) is model
    assert sum(p.numel() for p in model.parameters()) == 11_696_552


def test_device_dtype_and_mode_follow_the_network():
    model = inject(timm.create_model("resnet18", device="meta", dtype=torch.bfloat16).eval())
    layer = layers(model)[0]
    assert layer.conv1x1.weight.dtype == torch.bfloat16
    assert layer.conv1x1.weight.device.type == "meta"
    assert not layer.training


def test_groups_and_stages():
    model = inject(timm.create_model("resnet18"), groups=16, stages=(4,))
    assert [(layer.channels, layer.groups) for layer in layers(model)] == [(512, 16)] * 2


def test_feature_extractors_and_networks_around_a_resnet():
    features = shake(timm.create_model("resnet18", features_only=True)).eval()
    wrapped = torch.nn.Sequential(copy.deepcopy(features))
    x = torch.randn(1, 3, 64, 64)
    inject(wrapped, stages=(1, 2))
    assert len(layers(wrapped)) == 4
    with torch.no_grad():
        for a, b in zip(wrapped(x), features(x), strict=True):
            torch.testing.assert_close(a, b)


def test_injected_model_saves_under_the_name_that_loads_it(tmp_path):
    from timm.models import save_for_hf

    model = shake(timm.create_model("resnet18", num_classes=5))
    inject(model, groups=16, stages=(3, 4), preserve=False).eval()
    args = {"ema_groups": 16, "ema_stages": [3, 4]}
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=args)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("vit_tiny_patch16_224", TypeError, r"VisionTransformer has no such block.*EmaAttn is"),
        ("seresnet18", ValueError, r"layer1\.0 has another attention layer \(SEModule\)"),
        ("efficientnet_b0", ValueError, "has another attention layer"),
        ("resnet18_ema", ValueError, "has EMA attention already"),
    ],
)
def test_networks_that_cannot_take_it_are_refused_untouched(name, error, said):
    model = timm.create_model(name, device="meta")
    before = list(model.state_dict())
    with pytest.raises(error, match=said):
        inject(model)
    assert list(model.state_dict()) == before


def test_preserve_refuses_a_norm_without_an_affine_part():
    model = timm.create_model("resnet18")
    model.layer3[0].bn2 = torch.nn.BatchNorm2d(256, affine=False)
    with pytest.raises(ValueError, match=r"layer3\.0\.bn2\.weight.*preserve=False"):
        inject(model)
    assert not layers(model)
    inject(model, preserve=False)


def test_stages_given_as_an_iterator_are_read_once():
    model = inject(timm.create_model("resnet18"), stages=iter([2]))
    assert [layer.channels for layer in layers(model)] == [128, 128]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("at", ["paper", "stages", "layer1"])
@pytest.mark.parametrize("kind", ["name", "class", "none", "scripted"])
def test_what_is_no_network_is_named(kind, at):
    network = timm.create_model("test_resnet", num_classes=2, scriptable=True).eval()
    model = {"name": "resnet18", "class": type(network), "none": None}.get(kind)
    model = torch.jit.script(network) if kind == "scripted" else model
    with pytest.raises(TypeError, match=r"model must be an nn\.Module that is not scripted, got"):
        inject(model, at=at)
