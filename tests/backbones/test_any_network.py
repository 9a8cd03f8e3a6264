"""timm's name `ema_any`: every timm network, with EMA attention."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.any_networks import NETWORKS, REFUSED
from support.networks import shake
from timm.models import save_for_hf

from ema_timm import EmaAttn, inject, placement

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

# One of each kind that is placed differently: a ResNet, stages of blocks, SE beside, a module that
# runs its own children, an identity as a stage, a list as a stage, maps (B, H, W, C), dense blocks.
EIGHT = {
    "resnet26": "layer4.1.ema",
    "convnext_atto": "stages.3.blocks.1.ema",
    "mobilenetv3_small_050": "blocks.5.0.ema",
    "regnety_002": "s4.b7.ema",
    "repvgg_a0": "stages.3.0.ema",
    "hrnet_w18_small": "incre_modules.3.0.ema",
    "swin_tiny_patch4_window7_224": "layers.3.blocks.1.ema",
    "densenet121": "features.norm5.ema",
}
SMALL = {"swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2}}


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, EmaAttn)}


def run(model, x=IMAGES):
    with torch.no_grad():
        return model(x)


def perturbed(model):
    """Move the parameters, the layers most, so that each does something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        for layer in layers(model).values():
            layer.gn.bias += torch.randn_like(layer.gn.bias)
    return model.eval()


def written(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


def check(plain, groups, x, folder):
    """Exact, with all names, and reloaded by timm's own functions; returns the layers' names."""
    model = inject(copy.deepcopy(plain), at="stages", groups=groups)
    found = layers(model)
    assert torch.equal(run(model, x), run(plain, x))
    assert [n for n in model.state_dict() if ".ema." not in n] == list(plain.state_dict())
    assert all(layer.groups <= groups for layer in found.values())
    model(x).square().mean().backward()
    for layer in found.values():
        assert layer.gn.bias.grad is not None
    loaded = timm.create_model(written(perturbed(model), folder), pretrained=True).eval()
    assert loaded.pretrained_cfg["architecture"] == "ema_any"
    assert torch.equal(run(loaded, x), run(model, x))
    return list(found)


@pytest.mark.parametrize("name", EIGHT)
def test_eight_networks_are_exact_and_reload(name, tmp_path):
    plain = shake(timm.create_model(name, num_classes=7, **SMALL.get(name, {}))).eval()
    assert check(plain, 8, IMAGES, tmp_path)[-1] == EIGHT[name]


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_all_networks_are_exact_and_reload_or_are_refused(name, tmp_path):
    if name in REFUSED:
        with pytest.raises(ValueError, match="too few stages with a map"):
            inject(timm.create_model(name, device="meta"), at="stages")
        return
    plain = shake(timm.create_model(name, num_classes=7)).eval()
    size = suitable_size(plain.pretrained_cfg)
    for groups in (8, 32):
        assert check(plain, groups, torch.randn(1, 3, size, size), tmp_path)


def suitable_size(cfg):
    """A small size that the network takes: windows of networks for 256 pixels do not fit others."""
    size = cfg["input_size"][-1]
    if cfg.get("fixed_input_size"):
        return size
    return 96 if size == 224 else min(size, 256)


def test_most_networks_are_placed():
    assert len(NETWORKS) == 137
    assert len(NETWORKS) - len(REFUSED) >= 115


def test_by_name_it_starts_from_the_weights_of_the_base(tmp_path):
    plain = shake(timm.create_model("convnext_atto")).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    overlay = {"file": str(tmp_path / "plain.safetensors")}
    options = {"base": "convnext_atto", "pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("ema_any", **options).eval()
    assert len(layers(model)) == 4
    assert torch.equal(run(model), run(plain))
    few = timm.create_model("ema_any", num_classes=3, at="stages.*.blocks.0", **options).eval()
    assert run(few).shape == (2, 3)
    assert torch.equal(few.forward_features(IMAGES), plain.forward_features(IMAGES))
    save_file(perturbed(model).state_dict(), tmp_path / "plain.safetensors")
    own = timm.create_model("ema_any", **options).eval()
    assert torch.equal(run(own), run(model))


def test_without_weights_it_starts_as_the_base_unless_preserve_is_off():
    torch.manual_seed(3)
    plain = timm.create_model("mobilenetv3_small_050").eval()
    torch.manual_seed(3)
    model = timm.create_model("ema_any", base="mobilenetv3_small_050", at="se").eval()
    assert torch.equal(run(model), run(plain))
    torch.manual_seed(3)
    fresh = timm.create_model("ema_any", base="mobilenetv3_small_050", at="se", preserve=False)
    assert not torch.equal(run(fresh.eval()), run(plain))


@pytest.mark.parametrize(
    "options",
    [
        {"base": "efficientnet_b0", "at": "se", "replace": True, "groups": 8},
        {"base": "mobilenetv3_small_050", "at": ["blocks.1.*", "blocks.2.0"], "preserve": False},
        {"base": "resnet18", "at": "paper", "stages": [3, 4]},
        {"base": "resnet18", "at": "layer4.*", "in_chans": 1, "cross_spatial": False},
        {"base": "resnet18.a1_in1k", "at": "stages", "num_classes": 0, "drop_path_rate": 0.1},
    ],
)
def test_arguments_are_saved_and_reload(options, tmp_path):
    model = perturbed(timm.create_model("ema_any", **options))
    name = written(model, tmp_path)
    x = IMAGES[:, : options.get("in_chans", 3)]
    loaded = timm.create_model(name, pretrained=True).eval()
    assert placement(loaded) == placement(model)
    assert torch.equal(run(loaded, x), run(model, x))


def test_injected_twice_it_still_reloads(tmp_path):
    model = inject(shake(timm.create_model("resnet18")), at="layer3.*", groups=8)
    inject(inject(model, at="layer4.1"), at="paper", stages=(1,))
    assert len(layers(model)) == 5
    name = written(perturbed(model), tmp_path)
    loaded = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(run(loaded), run(model))


def test_a_family_that_the_paper_fills_without_a_name_reloads(tmp_path):
    model = perturbed(inject(shake(timm.create_model("efficientnet_lite0"))))
    config = written(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architecture"] == "ema_any"
    assert saved["model_args"]["at"] == "paper"
    assert torch.equal(run(timm.create_model(config, pretrained=True).eval()), run(model))


def test_features_and_adaptation(tmp_path):
    model = perturbed(timm.create_model("ema_any", base="regnety_002"))
    name = written(model, tmp_path)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    want = model.forward_intermediates(IMAGES, intermediates_only=True)
    plain = timm.create_model("regnety_002", features_only=True)
    assert features.feature_info.channels() == plain.feature_info.channels()
    for got, expected in zip(run(features), want, strict=True):
        assert torch.equal(got, expected)
    few = timm.create_model(name, pretrained=True, num_classes=3, features_only=False).eval()
    assert torch.equal(few.forward_features(IMAGES), model.forward_features(IMAGES))
    few.reset_classifier(5)
    assert run(few).shape == (2, 5)
    last = timm.create_model(name, pretrained=True, features_only=True, out_indices=(-1,)).eval()
    assert torch.equal(run(last)[0], want[-1])


def test_weights_with_other_layers_are_refused_also_with_other_classes(tmp_path):
    model = timm.create_model("ema_any", base="resnet18", at="layer4.*", groups=8)
    name = written(model, tmp_path)
    for options in ({"at": "layer3.*"}, {"at": "layer3.*", "num_classes": 3}):
        with pytest.raises(ValueError, match=r"hold EMA layers at layer4\.0\.ema.*Leave at= out"):
            timm.create_model(name, pretrained=True, **options)
    with pytest.raises(ValueError, match=r"8 groups in the weights, and 16 by groups="):
        timm.create_model(name, pretrained=True, groups=16, num_classes=3)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, TypeError, r'create_model\("ema_any", base="convnext_tiny", at="stages"'),
        (
            {"base": "local-dir:runs/x"},
            ValueError,
            r"inject\(timm.create_model\('local-dir:runs/x'",
        ),
        ({"base": "resnet5"}, ValueError, "must be a name of timm.list_models"),
        ({"base": "ema_any"}, ValueError, "must be a name of timm.list_models"),
        ({"base": "test_vit"}, ValueError, r"blocks\.5 returns tokens"),
        ({"base": "test_resnet", "depth": 3}, TypeError, "depth"),
        ({"base": "test_resnet", "out_indices": (1,)}, TypeError, "features_only"),
        ({"base": "test_resnet", "features_only": True, "feature_cls": "fx"}, ValueError, "getter"),
    ],
)
def test_wrong_arguments_say_what_to_write(options, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("ema_any", **options)


def test_the_name_is_listed_apart_from_the_papers_networks():
    assert "ema_any" in timm.list_models()
    assert "ema_any" not in timm.list_models("*_ema")
    assert not timm.is_model_pretrained("ema_any")
