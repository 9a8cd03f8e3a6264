"""`ema_timm.tune` and ``ema-timm tune`` as a person calls them, on the CPU."""

import json

import pytest
import torch
from torch import nn

import ema_timm
from ema_timm import EmaAttn, inject, tune
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.ops.gpu import choices
from ema_timm.ops.gpu.choice_file import LAYOUTS, Layer
from ema_timm.tuning import decide, tuner
from ema_timm.tuning.tuner import find_layers


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few samples, and not Triton's interpreter, which takes minutes."""
    monkeypatch.delenv("EMA_TIMM_GPU", raising=False)
    monkeypatch.setattr(decide, "ROUNDS", 1)
    monkeypatch.setattr(decide, "SAMPLE_MS", 0.0)
    monkeypatch.setattr(tuner, "IMPLEMENTATIONS", ("reference", "closed_form"))
    monkeypatch.setattr(choices, "_chosen", {})
    monkeypatch.setattr(choices, "_default", {})


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        EmaAttn(8, groups=2),
        EmaAttn(8, groups=2),
        EmaAttn(8, groups=4),
    )


IMAGES = torch.randn(2, 3, 8, 7)


def test_every_distinct_layer_is_chosen_for_once_and_looked_up_from_then_on():
    tuned = tune(model(), IMAGES, progress=False)
    layers = [choice.layer for choice in tuned.choices]
    shape = {"batch": 2, "channels": 8, "height": 6, "width": 5, "dtype": "float32"}
    assert layers == [
        Layer(**shape, groups=groups, layout="contiguous", training=training)
        for groups in (2, 4)
        for training in (True, False)
    ]
    for choice in tuned.choices:
        assert set(choice.candidates) == {"closed_form", "reference"}
        x = torch.empty(2, 8, 6, 5)
        seen = choices.look_up(x, choice.layer.groups, choice.layer.training)
        assert seen == choice.chosen in choice.candidates
    assert all(choice.remembered for choice in tune(model(), IMAGES, progress=False).choices)


def test_the_model_is_left_as_it_was():
    net = model()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    tune(net, IMAGES, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net] == [True, False, True, True, True]
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_types_and_layouts_are_those_that_reach_the_layer():
    net = model().eval().to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        layers, _ = find_layers(net, images, training=False)
    assert {(layer.dtype, layer.layout) for layer in layers} == {("bfloat16", "channels_last")}
    assert set(layers.values()) == {torch.float32}
    with torch.inference_mode():
        for example in ((IMAGES,), {"input": IMAGES}):
            assert len(tune(model().eval(), example, progress=False).choices) == 2


def test_a_call_under_autocast_measures_backwards_outside_of_it():
    with torch.autocast("cpu", torch.bfloat16):
        tuned = tune(model(), IMAGES, progress=False)
    for choice in tuned.choices:
        assert choice.layer.dtype == "bfloat16"
        assert all("ms" in entry for entry in choice.candidates.values()), choice


def test_layers_without_cross_spatial_learning_are_left_out():
    net = nn.Sequential(EmaAttn(8, groups=2), EmaAttn(8, groups=4, cross_spatial=False))
    layers, _ = find_layers(net, torch.randn(1, 8, 3, 3), training=False)
    assert [layer.groups for layer in layers] == [2]


def test_a_model_without_such_layers_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^Conv2d ran no EMA layer to tune.*\.$"):
        tune(nn.Conv2d(3, 8, 3), IMAGES)


def test_an_empty_batch_is_refused_in_one_line(capsys):
    with pytest.raises(UserError, match=r"at least one sample, got \(0, 8, 6, 5\)"):
        tune(model(), IMAGES[:0])
    assert main(["tune", "test_resnet_ema", "--batch-size", "0", "--device", "cpu"]) == 2
    assert "--img-size and --batch-size must be at least 1" in capsys.readouterr().err


def test_where_nothing_is_written_a_second_model_does_not_push_the_first_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path / "file"))
    first, second = (
        tune(EmaAttn(8, groups=groups), torch.randn(1, 8, 3, 3), False, progress=False)
        for groups in (2, 4)
    )
    assert first.file is None and "valid only for this process" in str(second)
    for groups in (2, 4):
        assert choices.look_up(torch.empty(1, 8, 3, 3), groups, False)


def test_an_injected_network_is_tuned_and_printed_as_a_table():
    import timm

    net = inject(timm.create_model("test_resnet"))
    text = str(tune(net, torch.randn(1, 3, 32, 32), training=False, progress=False))
    header, _, *rows = text.partition("\n\n")[0].splitlines()
    assert header == "| layer | chosen | closed_form, ms | reference, ms | why |"
    assert len(rows) == 4 and all("inference" in row for row in rows)
    assert "The CPU always runs the closed form" in text


def test_the_command_prints_the_table_and_writes_json_and_env_shows_the_choices(capsys, tmp_path):
    args = [
        "tune",
        "test_resnet_ema",
        "--img-size",
        "32",
        "--batch-size",
        "1",
        "--amp",
        "--channels-last",
    ]
    file = tmp_path / "tune.json"
    assert main([*args, "--inference", "--device", "cpu", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    layers = json.loads(file.read_text())["layers"]
    assert {entry["layer"]["dtype"] for entry in layers} == {"bfloat16"}
    assert {entry["layer"]["layout"] for entry in layers} <= set(LAYOUTS)
    assert not any(entry["layer"]["training"] for entry in layers)
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"choices: {len(layers)} layers" in shown
    for entry in layers:
        place = str(Layer(**entry["layer"]))
        assert f"| {place} | {entry['chosen']} |" in table
        assert f"{place}: {entry['chosen']}\n" in shown


def test_a_name_that_is_none_and_an_unknown_gpu_mode_are_refused(monkeypatch, capsys):
    assert main(["tune", "test_resnet_emma", "--device", "cpu"]) == 2
    assert "Did you mean test_resnet_ema" in capsys.readouterr().err
    monkeypatch.setenv("EMA_TIMM_GPU", "on")
    args = ["--img-size", "32", "--batch-size", "1", "--device", "cpu"]
    assert main(["tune", "test_resnet_ema", *args]) == 2
    assert capsys.readouterr().err.startswith("ema-timm: EMA_TIMM_GPU must be one of auto, off")
    assert main(["env"]) == 0  # a bug report can be made
    assert "got 'on'" in capsys.readouterr().out


def test_a_folder_is_tuned_for_as_well(trained, capsys):
    args = ["--img-size", "32", "--batch-size", "1", "--device", "cpu", "--inference"]
    assert main(["tune", str(trained), *args]) == 0
    assert "inference" in capsys.readouterr().out


def test_tune_is_public():
    assert ema_timm.tune is tuner.tune is ema_timm.tuning.tune
