"""What a folder says of the training that its checkpoint came from."""

import argparse
import json

import pytest
import timm
import torch

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.labels import read_labels
from ema_timm.checkpoints.network import check_network
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.checkpoints.results import public_model_name
from ema_timm.checkpoints.write import write_converted
from ema_timm.cli import main
from ema_timm.errors import UserError


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("local-dir:/home/me/runs/base", "local-dir:base"),
        ("hf-hub:me/base", "hf-hub:me/base"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
    ],
)
def test_names_lose_the_places_of_folders_and_nothing_else(name, public):
    assert public_model_name(name) == public


def test_results_do_not_say_where_files_of_the_training_were(tmp_path):
    model = timm.create_model("test_resnet_ema", num_classes=3)
    arguments = argparse.Namespace(
        model="local-dir:/home/me/runs/base",
        pretrained=True,
        data_dir="/home/me/flowers",
        initial_checkpoint="/home/me/base.pth",
        class_map="/home/me/classes.txt",
        model_kwargs={"cache_dir": "/home/me/cache", "in_chans": 3},
    )
    file = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": model.state_dict(), "args": arguments}, file)
    write_converted(file, tmp_path / "out", model="test_resnet_ema")
    text = (tmp_path / "out" / "results.json").read_text()
    assert "/home" not in text and str(tmp_path) not in text
    results = json.loads(text)
    assert results["arguments"]["model"] == results["base"]["model"] == "local-dir:base"
    assert results["arguments"]["data_dir"] == "flowers"
    assert results["arguments"]["class_map"] == "classes.txt"
    assert results["arguments"]["model_kwargs"] == {"in_chans": 3}


@pytest.mark.parametrize("at", ["config.json", "results.json", "model.safetensors"])
def test_a_conversion_that_is_killed_is_made_by_the_next_call(at, tmp_path, monkeypatch):
    model = timm.create_model("test_resnet_ema", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    write = CheckpointWriter.write

    def killed(self, name, content):
        if name == at:
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CheckpointWriter, "write", killed)
        write_converted(tmp_path / "w.pt", tmp_path / "out", model="test_resnet_ema")
    write_converted(tmp_path / "w.pt", tmp_path / "out", model="test_resnet_ema")
    assert check_network(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"]["file"] == "w.pt"


def test_a_measured_file_does_not_say_where_its_weights_were_cached(digits, tmp_path):
    torch.save(timm.create_model("test_resnet_ema", num_classes=4).state_dict(), tmp_path / "w.pt")
    args = [
        "evaluate",
        tmp_path / "w.pt",
        "--model",
        "test_resnet_ema",
        "--output",
        tmp_path / "out",
    ]
    args += ["--model-kwargs", f"cache_dir={tmp_path}/cache", "--img-size", 32, "--workers", 0]
    assert main([str(arg) for arg in [*args, "--data-dir", digits, "--device", "cpu"]]) == 0
    for name in ("config.json", "results.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


@pytest.mark.parametrize("name", ["labels.txt", "labels.json"])
def test_the_byte_order_mark_of_a_file_of_names_is_no_part_of_a_name(name, tmp_path):
    text = "rose\r\ntulip\r\n" if name.endswith("txt") else '["rose", "tulip"]'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_labels(tmp_path / name).names == ["rose", "tulip"]


def test_a_folder_in_place_of_a_checkpoint_file_is_called_one(tmp_path):
    with pytest.raises(UserError, match=r"is a folder\. Give a checkpoint file"):
        read_checkpoint(tmp_path)
