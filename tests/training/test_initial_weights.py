"""A run starts from the weights that it names, or does not start."""

import json
import re
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file
from support.runs import cli, run
from timm.models import get_pretrained_cfg

from ema_timm.checkpoints.weights import LONGEST_HEADER
from ema_timm.cli import main
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model

PLAIN = "test_resnet"


def weights_of(name, seed=5, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).state_dict()


def refused(args, capsys):
    """The one line with which a command refuses."""
    assert main([str(arg) for arg in args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ema-timm: ") and len([x for x in lines if "ema-timm:" in x]) == 1
    return lines[-1]


@pytest.mark.parametrize("model", [PLAIN, "test_resnet_ema"])
def test_a_file_of_foreign_names_is_no_start(config, tmp_path, capsys, model):
    file = tmp_path / "foreign.safetensors"
    save_file({f"body.{k}.x": v for k, v in weights_of(PLAIN).items()}, file)
    said = refused(cli(config, "--model", model, "--weights", file, "--pretrained"), capsys)
    assert "foreign.safetensors" in said and "(conv1.0.weight" in said and "body.bn1.bias.x" in said
    assert re.search(r"(\d+) of \1 weights", said)
    assert not (tmp_path / "run").exists()


def test_a_file_that_lacks_a_part_of_the_network_is_no_start(config, tmp_path, capsys):
    file = tmp_path / "part.safetensors"
    kept = {k: v for k, v in weights_of(PLAIN).items() if not k.startswith("layer4.")}
    save_file(kept, file)
    said = refused(cli(config, "--model", PLAIN, "--weights", file, "--pretrained"), capsys)
    assert "layer4.0.conv1.weight" in said


def test_a_folder_whose_weights_are_of_foreign_names_is_no_start(config, tmp_path, capsys):
    run(config, epochs=1)
    folder = tmp_path / "run"
    state = {f"body.{k}": v for k, v in weights_of("test_resnet_ema", num_classes=4).items()}
    save_file(state, folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "num_classes": 7}))
    more = ["--model", f"local-dir:{folder}", "--output", tmp_path / "more", "--pretrained"]
    assert "body.bn1.weight" in refused(cli(config, *more), capsys)


def test_foreign_names_of_a_network_with_as_many_classes_are_one_line(config, tmp_path, capsys):
    """timm loads these strictly, and PyTorch's error lists all names."""
    run(config, epochs=1)
    file = tmp_path / "foreign.safetensors"
    save_file({f"{k}.x": v for k, v in weights_of("test_resnet_ema", num_classes=4).items()}, file)
    more = ["--model", f"local-dir:{tmp_path / 'run'}", "--output", tmp_path / "b", "--pretrained"]
    said = refused(cli(config, *more, "--weights", file), capsys)
    assert "the weights do not fit: " in said and "Missing key(s)" in said and len(said) < 1000
    assert said.endswith("start from random weights with --no-pretrained.")


@pytest.mark.parametrize("how", ["head", "channels", "more"])
def test_what_timm_adapts_is_a_start(config, tmp_path, how):
    """Another head, other input channels, tensors that the network has no use for."""
    state = weights_of(PLAIN, num_classes=7)
    kwargs = {"in_chans": 1} if how == "channels" else {}
    if how == "more":
        state["aux.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "plain.safetensors")
    for model in (PLAIN, "test_resnet_ema"):
        start = {"model": model, "weights": str(tmp_path / "plain.safetensors"), "lr": 1e-12}
        output = str(tmp_path / model)
        results = run(
            config, **start, output=output, pretrained=True, epochs=1, model_kwargs=kwargs
        )
        assert results["base"]["weights"] == "plain.safetensors"
        trained = timm.create_model(f"local-dir:{output}", pretrained=True).state_dict()
        name = "layer1.0.conv1.weight"
        torch.testing.assert_close(trained[name], state[name], rtol=1e-4, atol=1e-6)


def test_the_check_of_the_start_draws_no_random_numbers(tmp_path):
    """What a start from given weights learns is what it was before they were looked at."""
    save_file(weights_of(PLAIN), tmp_path / "plain.safetensors")
    initial = InitialModel("test_resnet_ema", {}, weights=str(tmp_path / "plain.safetensors"))
    torch.manual_seed(3)
    create_model(initial, 4)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    timm.create_model("test_resnet_ema", num_classes=4)
    assert torch.equal(drawn, torch.rand(1))


def test_weights_of_a_folder_are_bounded_too(config, tmp_path, capsys):
    run(config, epochs=1)
    file = tmp_path / "run" / "model.safetensors"
    header = b'{"a":' + b" " * LONGEST_HEADER + b"}"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    more = ["--model", f"local-dir:{tmp_path / 'run'}", "--output", tmp_path / "b", "--pretrained"]
    assert "has a header of" in refused(cli(config, *more), capsys)


def test_a_timm_name_starts_from_the_file_of_its_repository(stage, config, tmp_path):
    hub, worker = stage
    state, repository = weights_of(PLAIN), get_pretrained_cfg(PLAIN).hf_hub_id
    hub.store.put(repository, {"model.safetensors": save(state)}, "Publish")
    done = worker.run(*cli(config, "--model", PLAIN, "--pretrained", "--epochs", 1, "--lr", 1e-12))
    assert done["code"] == 0, done["err"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["base"]["hub_repository"] == repository
    trained = load_file(tmp_path / "run" / "model.safetensors")
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(trained[name], state[name], rtol=1e-4, atol=1e-6)
    assert str(tmp_path) not in (tmp_path / "run" / "config.json").read_text()
    assert '"file"' not in (tmp_path / "run" / "config.json").read_text()
