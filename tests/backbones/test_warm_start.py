"""The warm start: the same function as the plain network, exactly, and free to leave it."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.networks import shake
from timm.models import get_arch_pretrained_cfgs

from ema_timm import EmaAttn, inject
from ema_timm.backbones.warm_start import warm_start_filter

# Both ResNet blocks, deep and plain stems, grouped and wide convolutions, blur pools, GroupNorm,
# the CIFAR stem and MobileNetV2.
PLAIN = [
    "resnet18",
    "resnet26t",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnetblur18",
    "resnet50_gn",
    "test_resnet",
    "cifar_resnet18",
    "mobilenetv2_050",
    "mobilenetv2_120d",
]


def plain_weights(name, path, **options):
    """A plain network with weights that a trained one might have, and their file."""
    model = shake(timm.create_model(name, **options)).eval()
    save_file(model.state_dict(), path)
    return model


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", PLAIN)
def test_warm_start_computes_what_the_plain_network_computes(name, tmp_path):
    file = tmp_path / "plain.safetensors"
    plain = plain_weights(name, file)
    model = timm.create_model(
        f"{name}_ema", pretrained=True, pretrained_cfg_overlay={"file": str(file)}
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, got = plain(x), model(x)
        assert want.std() > 0.01  # the comparison compares something
        assert torch.equal(got, want)
        for a, b in zip(
            model.forward_intermediates(x)[1], plain.forward_intermediates(x)[1], strict=True
        ):
            assert torch.equal(a, b)


def test_without_the_warm_start_the_features_are_damaged(tmp_path):
    """What the mapping is for: the same weights without it give another function."""
    plain = shake(timm.create_model("resnet18")).eval()
    model = timm.create_model("resnet18_ema").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_difference(model(x), plain(x)) > 0.1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_warm_start_under_adaptation(name, tmp_path):
    file = tmp_path / "plain.safetensors"
    plain = plain_weights(name, file)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        few = timm.create_model(f"{name}_ema", num_classes=5, **options).eval()
        assert few(x).shape == (1, 5)
        assert torch.equal(few.forward_features(x), plain.forward_features(x))
        grey = timm.create_model(f"{name}_ema", in_chans=1, **options).eval()
        plain_grey = timm.create_model(name, in_chans=1, **options).eval()
        assert torch.equal(grey(x[:, :1]), plain_grey(x[:, :1]))
        features = timm.create_model(f"{name}_ema", features_only=True, **options).eval()
        plain_features = timm.create_model(name, features_only=True, **options).eval()
        for a, b in zip(features(x), plain_features(x), strict=True):
            assert torch.equal(a, b)
        some = timm.create_model(f"{name}_ema", ema_stages=(3,), ema_groups=8, **options).eval()
        assert torch.equal(some(x), plain(x))


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet18", "mobilenetv2_050"])
def test_training_leaves_the_warm_start(name, tmp_path):
    file = tmp_path / "plain.safetensors"
    plain_weights(name, file)
    model = timm.create_model(
        f"{name}_ema",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        num_classes=3,
    ).train()
    found = {n: m for n, m in model.named_modules() if isinstance(m, EmaAttn)}
    start = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in found.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    for step in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if step == 0:  # γ, β and the 3×3 convolution move at once; the 1×1 follows γ
            for layer in found.values():
                for parameter in (layer.gn.weight, layer.gn.bias, layer.conv3x3.weight):
                    assert parameter.grad.abs().max() > 0
        optimizer.step()
    for name, layer in found.items():
        for key, parameter in layer.named_parameters():  # by now γ has let the 1×1 in as well
            assert parameter.grad.abs().max() > 0, f"{name}.{key}"
        for key in ("gn.weight", "gn.bias", "conv3x3.weight"):
            assert not torch.equal(layer.get_parameter(key), start[name][key]), f"{name}.{key}"
    with torch.no_grad():
        g = torch.randn(2, layer.channels, 6, 6)
        assert (layer(g) - 0.5 * g).abs().max() > 1e-6


def test_gate_is_one_half_for_any_input():
    model = inject(shake(timm.create_model("resnet18")))
    layer = model.layer2[0].se
    x = torch.randn(2, layer.channels, 9, 5) * 100
    assert torch.equal(layer(x), x * 0.5)
    assert layer.conv3x3.weight.abs().max() > 0
    torch.testing.assert_close(
        layer.conv3x3.weight.sum(0), torch.zeros_like(layer.conv3x3.weight[0]), atol=1e-6, rtol=0
    )


def test_ema_weights_pass_the_filter_unchanged(tmp_path):
    trained = shake(timm.create_model("test_resnet_ema")).eval()
    save_file(trained.state_dict(), tmp_path / "ema.safetensors")
    model = timm.create_model(
        "test_resnet_ema",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "ema.safetensors")},
    ).eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key]), key


def test_damaged_ema_weights_are_not_mistaken_for_plain_ones(tmp_path):
    state = timm.create_model("test_resnet_ema").state_dict()
    del state["layer2.0.se.gn.weight"]
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(RuntimeError, match=r"layer2\.0\.se\.gn\.weight"):
        timm.create_model(
            "test_resnet_ema",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "damaged.safetensors")},
        )


def test_missing_plain_weights_are_reported():
    model = timm.create_model("test_resnet_ema")
    state = timm.create_model("test_resnet").state_dict()
    del state["layer1.0.bn2.weight"]
    with pytest.raises(RuntimeError, match=r"layer1\.0\.bn2\.weight"):
        model.load_state_dict(warm_start_filter(state, model))


def test_filter_leaves_the_given_weights_alone():
    model, state = (
        timm.create_model("test_resnet_ema"),
        timm.create_model("test_resnet").state_dict(),
    )
    before = {k: v.clone() for k, v in state.items()}
    warm_start_filter(state, model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], before[k]) for k in before)


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "mobilenetv2_100", "resnetaa50d"])
def test_every_pretrained_tag_has_a_twin(name):
    plain = {k.partition(".")[2]: v for k, v in get_arch_pretrained_cfgs(name).items()}
    twins = {k.partition(".")[2]: v for k, v in get_arch_pretrained_cfgs(f"{name}_ema").items()}
    assert list(twins) == [f"warm_{tag}" for tag in plain]  # in order: the default stays first
    for tag, cfg in plain.items():
        twin = twins[f"warm_{tag}"]
        assert twin.hf_hub_id == f"timm/{name}.{tag}"
        assert twin.architecture == f"{name}_ema"
        same = "url license mean std input_size test_input_size crop_pct test_crop_pct".split()
        for field in (*same, "interpolation", "num_classes", "first_conv", "classifier"):
            assert getattr(twin, field) == getattr(cfg, field), field
    assert timm.is_model_pretrained(f"{name}_ema")


def test_networks_without_weights_say_so():
    assert not timm.is_model_pretrained("mobilenetv2_035_ema")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mobilenetv2_035_ema"):
        timm.create_model("mobilenetv2_035_ema", pretrained=True)


def test_default_weights_come_from_the_plain_repository(monkeypatch, tmp_path):
    """They are asked of timm's own repository; stood in for by what it would give."""
    plain = shake(timm.create_model("resnet18")).eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetch(repository, name, cache_dir):
        asked.append(repository)
        return tmp_path / name

    monkeypatch.setattr("ema_timm.hub.fetch.fetch", fetch)
    model = timm.create_model("resnet18_ema", pretrained=True).eval()
    tagged = timm.create_model("resnet18_ema.warm_gluon_in1k", pretrained=True).eval()
    assert asked == ["timm/resnet18.a1_in1k", "timm/resnet18.gluon_in1k"]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert torch.equal(tagged(x), plain(x))
