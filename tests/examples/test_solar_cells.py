"""The example on solar cells: its conversion and its split, without its two packages."""

import csv
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support.networks import shake

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "solar_cells"


@pytest.fixture(scope="module")
def prepare():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import prepare

        yield prepare
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture
def network():
    torch.manual_seed(0)
    arguments = {"pad_type": "same", "bn_eps": 1e-3, "num_classes": 0}
    return shake(timm.create_model("mobilenetv2_100", **arguments)).eval()


def keras_layers(network):
    """What Keras would hold for this network: layers in its order, kernels (H, W, in, out)."""
    modules = [
        m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d)
    ]
    names = ["Conv1", "bn_Conv1"]
    for block in ("expanded_conv", *(f"block_{number}" for number in range(1, 17))):
        steps = ["depthwise", "project"] if block == "expanded_conv" else [
            "expand", "depthwise", "project"]  # fmt: skip
        names += [f"{block}_{step}{suffix}" for step in steps for suffix in ("", "_BN")]
    for name, module in zip([*names, "Conv_1", "Conv_1_bn"], modules, strict=True):
        if isinstance(module, torch.nn.BatchNorm2d):
            yield f"{name}/gamma:0", module.weight
            yield f"{name}/beta:0", module.bias
            yield f"{name}/moving_mean:0", module.running_mean
            yield f"{name}/moving_variance:0", module.running_var
        elif module.groups > 1:
            yield f"{name}/kernel:0", module.weight.permute(2, 3, 0, 1)
        else:
            yield f"{name}/kernel:0", module.weight.permute(2, 3, 1, 0)


def test_a_keras_file_becomes_the_same_network(prepare, network, tmp_path):
    with h5py.File(tmp_path / "keras.h5", "w") as file:
        for name, value in keras_layers(network):
            file[f"model_weights/mobilenetv2_1.00_160/{name}"] = value.detach().numpy()
        file["model_weights/dense/kernel:0"] = np.zeros((1280, 120))  # the head is not taken
    prepare.write_weights(tmp_path / "keras.h5", tmp_path / "trunk.safetensors")
    state, want = load_file(tmp_path / "trunk.safetensors"), network.state_dict()
    assert set(state) == set(want)
    for name in want:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], want[name]), name


def test_the_split_is_50_10_40():
    with (EXAMPLE / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == len(rows) == 2624
    assert Counter(row["split"] for row in rows) == {"train": 1311, "val": 262, "test": 1051}


def test_images_are_linked_by_split_and_class(prepare, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    with (EXAMPLE / "split.csv").open() as file:
        rows = [next(csv.reader(file)), *csv.reader(file)][1:5]
    probabilities = (0.0, 1 / 3, 2 / 3, 1.0)
    lines = []
    for (name, _), probability in zip(rows, probabilities, strict=True):
        Image.new("L", (8, 8)).save(data / "images" / name)
        lines.append(f"images/{name}  {probability}  mono")
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    counts = prepare.link_images(data, tmp_path / "cells")
    classes = ["functional", "functional", "defective", "defective"]
    for (name, split), label in zip(rows, classes, strict=True):
        with Image.open(tmp_path / "cells" / split / label / name) as image:
            assert image.size == (8, 8)
    assert sum(counts.values()) == 4
    assert prepare.link_images(data, tmp_path / "cells") == counts  # a second time as well
