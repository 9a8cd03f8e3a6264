"""The registered names: complete, placed as in the paper, and whole timm models."""

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ema_timm import EmaAttn
from ema_timm.backbones.resnet_ema import plain_names

CIFAR = ["cifar_resnet18", "cifar_resnet50", "cifar_resnet101"]
MOBILENET = [f"mobilenetv2_{s}" for s in ("035", "050", "075", "100", "110d", "120d", "140")]
# One of each kind of network, small enough to run.
KINDS = ["test_resnet_ema", "resnet10t_ema", "mobilenetv2_035_ema", "cifar_resnet18_ema"]


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, EmaAttn)}


def test_resnet_names_are_all_of_timms_resnets_without_attention():
    """Against the networks themselves, built one by one."""
    without = []
    for name in timm.list_models(module="resnet"):
        model = timm.create_model(name, device="meta")
        blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
        if all(block.se is None for block in blocks):
            without.append(name)
    assert plain_names() == without
    assert len(without) > 40


def test_every_promised_name_is_listed():
    promised = {f"{name}_ema" for name in [*plain_names(), *MOBILENET, *CIFAR]}
    assert set(timm.list_models("*_ema")) == promised
    assert set(timm.list_models("cifar_*")) == {*CIFAR, *(f"{name}_ema" for name in CIFAR)}
    assert timm.list_models("resnet50_ema", module="resnet") == []


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50_ema", 25_755_400),
        ("resnet18_ema", 11_696_552),
        ("mobilenetv2_100_ema", 3_549_272),
        ("cifar_resnet50_ema", 23_903_620),
        ("cifar_resnet101_ema", 43_072_004),
        ("cifar_resnet50", 23_705_252),
        ("cifar_resnet101", 42_697_380),
    ],
)
def test_parameter_totals(name, parameters):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", timm.list_models("*_ema"))
def test_every_name_builds_with_its_features(name):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["license"]
    assert len(cfg["input_size"]) == 3
    found = layers(model)
    assert found
    for layer in found.values():
        divisors = [g for g in range(1, 33) if layer.channels % g == 0]
        assert layer.groups == max(divisors)
    plain = timm.create_model(name.removesuffix("_ema"), features_only=True, device="meta")
    features = timm.create_model(name, features_only=True, device="meta")
    assert type(features) is type(plain)
    for what in ("channels", "reduction", "module_name"):
        assert getattr(features.feature_info, what)() == getattr(plain.feature_info, what)()


def test_placement_in_resnets_is_every_block_on_its_output():
    model = timm.create_model("resnet50_ema", device="meta")
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert [b.se.channels for b in blocks] == [b.conv3.out_channels for b in blocks]
    assert len(layers(model)) == 16


def test_placement_in_mobilenetv2_is_by_expanded_width():
    model = timm.create_model("mobilenetv2_100_ema", device="meta")
    found = layers(model)
    assert len(found) == 13
    assert all(layer.channels > 144 for layer in found.values())
    assert isinstance(model.blocks[1][1].se, nn.Identity)  # expanded to exactly 144


@pytest.mark.parametrize("name", KINDS)
def test_trains_and_takes_what_timm_models_take(name):
    model = timm.create_model(
        name, num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.1, global_pool="max"
    )
    x = torch.randn(2, 1, 64, 64)
    out = model(x)
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert isinstance(model.get_classifier(), nn.Linear)
    _, features = model.eval().forward_intermediates(x)
    assert len(features) == 5
    assert features[-1].shape[-1] * model.feature_info[-1]["reduction"] == 64
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.num_features)


@pytest.mark.parametrize("name", KINDS)
def test_features_only_gives_the_maps_that_feature_info_promises(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 3))
    x = torch.randn(1, 3, 64, 64)
    info = model.feature_info
    for feature, channels, reduction in zip(
        model(x), info.channels(), info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "fx", "getter"])
@pytest.mark.parametrize("name", ["test_resnet_ema", "mobilenetv2_035_ema"])
def test_feature_wrappers_work_as_for_the_plain_twin(name, wrapper):
    options = {"features_only": True, "feature_cls": wrapper}
    x = torch.randn(1, 3, 64, 64)
    try:
        plain = timm.create_model(name.removesuffix("_ema"), **options)(x)
    except AssertionError as error:  # some of timm's versions cannot wrap a MobileNetV2
        with pytest.raises(AssertionError, match=str(error)[:14]):
            timm.create_model(name, **options)
        return
    out = timm.create_model(name, **options)(x)
    if isinstance(out, dict):
        assert out.keys() == plain.keys()
        out, plain = out.values(), plain.values()
    assert [f.shape for f in out] == [f.shape for f in plain]


@pytest.mark.parametrize(
    ("name", "stride", "expected"),
    [
        ("resnet10t_ema", 8, 8),
        ("mobilenetv2_035_ema", 16, 16),
        ("cifar_resnet18_ema", 4, 4),
        ("cifar_resnet18_ema", 2, 2),
    ],
)
def test_output_stride(name, stride, expected):
    model = timm.create_model(name, output_stride=stride, features_only=True).eval()
    out = model(torch.randn(1, 3, 64, 64))
    assert 64 // out[-1].shape[-1] == expected == model.feature_info.reduction()[-1]


def test_cifar_output_stride_is_checked():
    with pytest.raises(ValueError, match="8, or 4 or 2 with dilation, got 32"):
        timm.create_model("cifar_resnet18_ema", output_stride=32)


def test_cifar_stem_keeps_the_resolution():
    model = timm.create_model("cifar_resnet18", features_only=True)
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [f.shape[-1] for f in model(torch.randn(1, 3, 32, 32))] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_device_and_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["resnet10t_ema", "mobilenetv2_035_ema"])
def test_parameter_groups_put_ema_in_its_block(name):
    from timm.models import group_parameters

    model = timm.create_model(name, device="meta")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for layer in layers(model):
        block = layer.rsplit(".", 1)[0]
        own = {groups[f"{layer}.{key}"] for key in ("conv1x1.weight", "gn.bias")}
        conv = next(k for k in groups if k.startswith(f"{block}.conv"))
        assert own == {groups[conv]}


def test_layer_decay_optimizer_covers_every_parameter():
    from timm.optim import create_optimizer_v2

    model = timm.create_model("resnet10t_ema")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_ema_keeps_its_own_initialisation():
    """timm's init draws every convolution from a normal of variance 2 / fan_out."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50_ema")
    for layer in layers(model).values():
        n = layer.gn.num_channels
        assert layer.conv1x1.weight.abs().max() <= n**-0.5  # uniform, PyTorch's own
        assert layer.gn.weight.eq(1).all()


def test_stages_and_groups_are_options():
    model = timm.create_model("resnet50_ema", ema_stages=(3, 4), ema_groups=16)
    found = layers(model)
    assert {name.split(".")[0] for name in found} == {"layer3", "layer4"}
    assert {layer.groups for layer in found.values()} == {16}
    model = timm.create_model("mobilenetv2_100_ema", ema_stages=[4])
    assert {name.split(".")[1] for name in layers(model)} == {"4"}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ema_stages": (5,)}, ValueError, r"\[1, 2, 3, 4\] in this network, got \[5\]"),
        ({"ema_stages": ()}, ValueError, r"got \[\]"),
        ({"ema_stages": ("layer1",)}, TypeError, "stage numbers"),
        ({"ema_groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"ema_gruops": 8}, TypeError, "ema_gruops"),
        ({"block_args": {"attn_layer": "se"}}, ValueError, "has another attention layer"),
    ],
)
def test_bad_options_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("test_resnet_ema", **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_torchscript_and_trace(name):
    model = timm.create_model(name, scriptable=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
        traced = torch.jit.trace(model, torch.randn(2, 3, 96, 96))
        torch.testing.assert_close(traced(x), model(x))
