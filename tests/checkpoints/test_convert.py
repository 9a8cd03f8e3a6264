"""Checkpoints of others' EMA attention compute the same under timm's names."""

import json

import pytest
import timm
import torch
from support.networks import shake

from ema_timm import EmaAttn
from ema_timm.checkpoints.convert import convert
from ema_timm.checkpoints.network import check_network
from ema_timm.cli import main
from ema_timm.errors import UserError


def authors(model, old=".ema."):
    """The state dict of the authors' fork: the layer is ``ema`` beside timm's ``se``."""
    return {name.replace(".se.", old): tensor for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def mobilenet():
    return shake(timm.create_model("mobilenetv2_035_ema", num_classes=5)).eval()


def true_groups(model):
    return {n: m.groups for n, m in model.named_modules() if isinstance(m, EmaAttn)}


def assert_same(done, model, x):
    loaded = timm.create_model(done.architecture, num_classes=model.num_classes, **done.model_args)
    loaded.load_state_dict(done.state)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), model(x))


@pytest.mark.parametrize("old", [".ema.", ".attn.", ".se."])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_authors_names_are_mapped(mobilenet, old, prefix):
    state = {prefix + name: tensor for name, tensor in authors(mobilenet, old).items()}
    done = convert({"state_dict": state, "epoch": 3}, "mobilenetv2_035")
    assert done.architecture == "mobilenetv2_035_ema"
    assert (done.model_args, done.unused) == ({}, ())
    assert done.groups == true_groups(mobilenet)
    assert_same(done, mobilenet, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    "args",
    [{"ema_groups": 8}, {"ema_stages": [3, 4]}, {"ema_groups": 4, "ema_stages": [2]}],
    ids=str,
)
def test_groups_and_stages_are_read_off_the_weights(args):
    model = shake(timm.create_model("test_resnet_ema", num_classes=3, **args)).eval()
    done = convert(authors(model), "test_resnet_ema")
    assert done.model_args == args
    assert_same(done, model, torch.randn(1, 3, 64, 64))


def test_groups_that_32_does_not_divide():
    """mobilenetv2_075's 432 channels have 27 groups, 720 have 30."""
    model = timm.create_model("mobilenetv2_075_ema")
    done = convert(authors(model), "mobilenetv2_075")
    assert done.groups == true_groups(model) and done.model_args == {}
    assert set(done.groups.values()) == {27, 30, 32}


def test_yolo_style_modules_are_told_by_name():
    model = shake(timm.create_model("test_resnet_ema", num_classes=3, ema_stages=[4])).eval()
    block = "layer4.0.se"
    state = {n.replace(block, "model.7.m"): t for n, t in model.state_dict().items()}
    with pytest.raises(UserError, match=r"no place for the EMA layer model\.7\.m; .*--rename"):
        convert(state, "test_resnet")
    done = convert(state, "test_resnet", {"model.7.m": block})
    assert done.model_args == {"ema_stages": [4]}
    assert_same(done, model, torch.randn(1, 3, 64, 64))


def test_what_is_not_used_is_reported(mobilenet):
    state = authors(mobilenet) | {"total_ops": torch.zeros(1), "blocks.0.0.ema2": torch.ones(1)}
    done = convert(state, "mobilenetv2_035_ema")
    assert done.unused == ("blocks.0.0.ema2", "total_ops")
    assert not set(done.unused) & set(done.state)


def lacking(model, name):
    return {k: v for k, v in authors(model).items() if name not in k}


REFUSED = {
    "no EMA": (lambda m: timm.create_model("mobilenetv2_035").state_dict(), "no EMA attention"),
    "one block without": (lambda m: lacking(m, "blocks.5.1.ema"), r"blocks\.5\.1 have none"),
    "nothing": (lambda m: {}, "no state dict"),
    "another width": (
        lambda m: authors(m) | {"blocks.5.0.ema.conv1x1.weight": torch.ones(7, 7, 1, 1)},
        "which must be a multiple",
    ),
    "two in a place": (
        lambda m: authors(m) | {k.replace(".se.", ".att."): v for k, v in m.state_dict().items()},
        "have the same place",
    ),
    "mixed groups": (
        lambda m: (
            authors(m)
            | {f"blocks.5.0.ema.{k}": v for k, v in other_width(m.blocks[5][0].se).items()}
        ),
        "which no single ema_groups",
    ),
}


def other_width(layer):
    return EmaAttn(layer.channels, groups=layer.groups // 2).state_dict()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_with_a_reason(case, mobilenet):
    make, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        convert(make(mobilenet), "mobilenetv2_035")
    assert "\n" not in str(error.value)


def test_bad_names_are_refused(mobilenet):
    with pytest.raises(UserError, match="timm has no convnext_tiny with EMA"):
        convert(authors(mobilenet), "convnext_tiny")
    with pytest.raises(UserError, match=r"has no module model\.9"):
        convert(authors(mobilenet), "mobilenetv2_035", {"model.9": "blocks.5.0.se"})


def test_the_command_writes_a_folder(mobilenet, tmp_path, capsys):
    state = {f"module.{name}": tensor for name, tensor in authors(mobilenet).items()}
    state["module.total_ops"] = torch.zeros(1)
    torch.save({"state_dict": state, "arch": "mobilenetv2_035"}, tmp_path / "best.pth.tar")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    args = ["convert", str(tmp_path / "best.pth.tar"), "--output", str(tmp_path / "out")]
    assert main([*args, "--labels", str(tmp_path / "names.txt")]) == 0
    printed = capsys.readouterr()
    assert "mobilenetv2_035_ema, 6 EMA layers, groups: 28, 32" in printed.out
    assert "not used: total_ops" in printed.err
    config = check_network(tmp_path / "out")
    assert config["label_names"] == ["a", "b", "c", "d", "e"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"]["file"] == "best.pth.tar" and "metrics" not in results
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), mobilenet(x))
    assert main(args) == 2  # a second time it would write over a checkpoint
    assert main(["card", str(tmp_path / "out")]) == 0
