"""A file that claims more than it holds is refused before it is unpacked."""

import argparse
import json
import struct
import time
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from ema_timm.checkpoints.bounds import MOST_MODULES, bounded_network
from ema_timm.checkpoints.network import check_network, rebuild
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.errors import UserError
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model


def large_header(file):
    """As many tensors as a header of 5 MB names; 44 MB take a minute, and much memory."""
    count = 80_000
    spec = {"dtype": "U8", "shape": [1]}
    head = {f"{i}": {**spec, "data_offsets": [i, i + 1]} for i in range(count)}
    text = json.dumps(head).encode()
    assert len(text) > 4 * 2**20
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(count))
    return file


def bomb(file):
    """A checkpoint of 64 MB in 70 kB: its records are packed, which torch.save never does."""
    plain = file.with_name("plain.pt")
    torch.save({"fc.weight": torch.zeros(16 * 2**20)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert file.stat().st_size < 2**18
    return file


@pytest.fixture(params=[large_header, bomb])
def attack(request, tmp_path):
    name = "weights.safetensors" if request.param is large_header else "weights.pt"
    return request.param(tmp_path / name)


SAID = r"is refused: .*(header of [\d,]+ bytes|unpack to [\d,]+ bytes)"


def test_a_checkpoint_is_bounded(attack):
    with pytest.raises(UserError, match=SAID) as error:
        read_checkpoint(attack)
    assert "\n" not in str(error.value)


def test_the_weights_that_a_run_starts_from_are_bounded(attack):
    with pytest.raises(UserError, match=SAID):
        create_model(InitialModel("test_resnet_ema", {}, weights=str(attack)), 3)


def test_the_weights_of_a_folder_are_bounded(tmp_path):
    config = {"architecture": "test_resnet_ema", "num_classes": 3, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    large_header(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=SAID):
        check_network(tmp_path)


def test_an_archive_cut_short_is_called_damaged(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"fc.weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read: .*Copy it again"):
        read_checkpoint(file)


def test_real_checkpoints_of_every_kind_are_read(tmp_path):
    state = timm.create_model("test_resnet_ema").state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        assert read_checkpoint(file).state.keys() == state.keys()


ABSURD = [
    {"model_args": {"layers": [10**6] * 4}},
    {"model_args": {"layers": [10**5] * 4}},  # within the bound of the numbers, not of the modules
    {"model_args": {"layers": [10**400, 1, 1, 1]}},
    {"model_args": {"block_args": {"a": [[0.1, 10**400]]}}},
    {"num_classes": 10**9},
]


@pytest.mark.parametrize("change", ABSURD, ids=range(len(ABSURD)))
def test_a_configuration_cannot_ask_for_an_endless_network(tmp_path, change, capsys):
    config = {"architecture": "resnet26", "num_classes": 3, "pretrained_cfg": {}, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(timm.create_model("test_resnet_ema", num_classes=3).state_dict(),
              tmp_path / "model.safetensors")  # fmt: skip
    began = time.process_time()
    said = r"(add up to|it has) more than [\d,]+"
    with pytest.raises(UserError, match=said):
        check_network(tmp_path)
    if "model_args" in change:  # a run has classes of its own
        with pytest.raises(UserError, match=said):
            create_model(InitialModel(f"local-dir:{tmp_path}", {}, weights=""), 3)
        args = argparse.Namespace(model="resnet26", model_kwargs=change["model_args"])
        state = timm.create_model("resnet26").state_dict()
        torch.save({"state_dict": state, "args": args}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=said):
            rebuild(read_checkpoint(tmp_path / "a.pt"))
    assert time.process_time() - began < 60


def test_the_bounds_leave_room_for_large_networks_and_end_with_them():
    with bounded_network(), torch.device("meta"):
        timm.create_model("hrnet_w64")
    chain = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(MOST_MODULES + 1)))
    assert len(chain) == MOST_MODULES + 1  # outside of the context there is no bound
