"""Files appear whole or not at all."""

import errno
import json

import pytest
import timm
import torch
from timm.data import resolve_data_config

from ema_timm.checkpoints.config import STUB
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.files import sha256


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointWriter(tmp_path / "run")
    folder.make()
    return folder


def names(folder):
    return sorted(p.name for p in folder.path.rglob("*") if p.is_file())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(folder, error):
    folder.write_text("results.json", "old")

    def half(path):
        path.write_text("ha")
        raise error

    with pytest.raises(type(error)):
        folder.write("results.json", half)
    assert (folder.path / "results.json").read_text() == "old"
    assert names(folder) == ["results.json"]


def test_name_appears_after_the_content_is_whole(folder):
    def write(path):
        assert path.parent == folder.path  # the same file system, so that renaming is atomic
        assert not (folder.path / "card").exists()
        path.write_text("all")

    folder.write("card", write)
    assert (folder.path / "card").read_text() == "all"


def save(folder, model, **model_args):
    data = {**resolve_data_config(model=model), "input_size": (3, 64, 64), "crop_pct": 1.0}
    return folder.save_model(model, model_args, data, ["cat", "dog", "emu"]), data


def test_model_files_hold_what_the_hub_format_asks_for(folder):
    model = timm.create_model("resnet18_ema", num_classes=3, ema_stages=[3, 4])
    model = model.to(memory_format=torch.channels_last).eval()
    digest, data = save(folder, model, ema_stages=[3, 4])
    assert digest == sha256(folder.path / "model.safetensors")
    assert (folder.path / "model.safetensors").stat().st_mode & 0o044  # not the owner's alone
    config = json.loads((folder.path / "config.json").read_text())
    assert config["architecture"] == "resnet18_ema"
    assert config["num_classes"] == 3
    assert config["label_names"] == ["cat", "dog", "emu"]
    assert config["model_args"]["ema_stages"] == [3, 4]
    assert "num_classes" not in config["model_args"]
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 64, 64]
    assert cfg["crop_pct"] == 1.0
    assert cfg["mean"] == list(data["mean"])
    # True of the warm start, not of what was trained from it.
    assert not {"tag", "notes", "test_input_size", "hf_hub_id", "url"} & set(cfg)
    assert names(folder) == ["config.json", STUB, "model.safetensors"]


@pytest.mark.parametrize("name", ["resnet18_ema", "mobilenetv2_035_ema", "cifar_resnet18_ema"])
def test_reloads_by_name(folder, name):
    model = timm.create_model(name, num_classes=3, in_chans=1).eval()
    save(folder, model, in_chans=1)
    loaded = timm.create_model(f"local-dir:{folder.path}", pretrained=True).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert tuple(resolve_data_config(model=loaded)["input_size"][1:]) == (64, 64)


@pytest.mark.filterwarnings("ignore")  # transformers warns about its own parts
def test_transformers_loads_the_folder(folder):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = timm.create_model("resnet18_ema", num_classes=3).eval()
    save(folder, model)
    theirs = AutoModelForImageClassification.from_pretrained(folder.path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x))
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert AutoImageProcessor.from_pretrained(folder.path).data_config["input_size"] == (3, 64, 64)
