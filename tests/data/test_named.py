"""timm's data sets by name are trained on and measured as image folders are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ema_timm.cli import main
from ema_timm.data.check import check_readable
from ema_timm.data.named import open_named
from ema_timm.errors import UnreadableImageError, UserError
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.training.run import finetune
from ema_timm.training.settings import FinetuneConfig


def config_for(name, data_dir, output, **changes):
    return FinetuneConfig(
        model="test_resnet_ema", dataset=name, data_dir=str(data_dir), output=str(output),
        pretrained=False, img_size=32, epochs=1, batch_size=12, hflip=0.0, device="cpu", workers=0,
        **changes,
    )  # fmt: skip


def measured(output, **images):
    return evaluate(EvaluateConfig(str(output), device="cpu", workers=0, **images), progress=False)


def test_a_folder_by_name_is_the_folder(digits, tmp_path):
    """The same weights come out, and the same counts."""
    by_name = finetune(config_for("torch/image_folder", digits, tmp_path / "a"), progress=False)
    plain = finetune(config_for("", digits, tmp_path / "b"), progress=False)
    assert by_name["classes"] == plain["classes"]
    assert by_name["weights_sha256"] == plain["weights_sha256"]
    counts = measured(tmp_path / "a", data_dir=str(digits), dataset="torch/image_folder")
    assert counts["metrics"]["correct"] == plain["metrics"]["correct"]
    assert counts["evaluation"]["data"]["name"] == "torch/image_folder"
    assert counts["evaluation"]["per_class"].keys() == set(plain["classes"])


def test_images_in_memory(mnist, tmp_path):
    results = finetune(config_for("torch/mnist", mnist, tmp_path / "run"), progress=False)
    assert results["data"]["train"]["images"] == 40
    assert results["metrics"]["images"] == 20
    assert len(results["classes"]) == 10
    counts = measured(tmp_path / "run", data_dir=str(mnist), dataset="torch/mnist", split="test")
    assert counts["metrics"]["correct"] == results["metrics"]["correct"]
    assert counts["evaluation"]["data"]["fingerprint"] == results["data"]["val"]["fingerprint"]


def test_the_fingerprint_is_of_pixels_and_classes(mnist):
    before = open_named("torch/mnist", mnist, "train").fingerprint()
    file = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_named("torch/mnist", mnist, "train").fingerprint() != before


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("wds/flowers", [], "takes images by their number, from torch/NAME or hfds/NAME"),
        ("torch/nothing", [], "timm cannot open its split train: Unknown torchvision dataset"),
        ("torch/cifar10", [], "timm cannot open its split train: Dataset not found"),
        ("torch/image_folder", ["--val-split", "0.2"], "works only with image folders"),
    ],
)
def test_what_cannot_be_opened_gets_one_line(tmp_path, capsys, name, more, said):
    args = ["finetune", "--model", "test_resnet_ema", "--data-dir", tmp_path, "--dataset", name]
    assert main([*map(str, args), "--output", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def hub_folder(digits, tmp_path, monkeypatch):
    """The digits as `datasets` reads a folder, without network; needs `pip install datasets`."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip("datasets")
    data = shutil.copytree(digits, tmp_path / "digits")
    (data / "val").rename(data / "validation")
    return data


def test_hugging_faces_data_sets(hub_folder, digits, tmp_path):
    name, kept = f"hfds/{hub_folder}", tmp_path / "kept"
    by_name = finetune(config_for(name, kept, tmp_path / "a"), progress=False)
    plain = finetune(config_for("", digits, tmp_path / "b"), progress=False)
    assert by_name["classes"] == plain["classes"]
    assert by_name["data"]["train"]["images"] == 60
    counts = measured(tmp_path / "a", data_dir=str(kept), dataset=name)
    assert counts["metrics"]["correct"] == by_name["metrics"]["correct"]
    assert counts["evaluation"]["data"]["name"] == "hfds/digits"
    assert str(tmp_path) not in json.dumps(counts)
    with pytest.raises(UserError, match="cannot open its split nowhere"):
        open_named(name, kept, "nowhere")


def test_a_damaged_image_of_hugging_face_is_named(hub_folder, tmp_path):
    bad = sorted(Path(hub_folder).glob("train/*/*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:-30])
    train = open_named(f"hfds/{hub_folder}", tmp_path / "kept", "train")
    with pytest.raises(UnreadableImageError, match="image 3 of hfds/digits, train"):
        check_readable(train, progress=False, decode=True)


def test_classes_get_the_numbers_of_the_checkpoint(digits):
    order = ["digit_3", "digit_2", "digit_1", "digit_0"]
    images = open_named(
        "torch/image_folder", digits, "val", {name: index for index, name in enumerate(order)}
    )
    images.transform = lambda image: torch.from_numpy(np.array(image))
    assert images.class_names == order
    assert images[0][1] == 3
    path = images.file_name(0)
    with Image.open(path) as image:
        assert torch.equal(images[0][0], torch.from_numpy(np.array(image.convert("RGB"))))
    with pytest.raises(UserError, match=r"not among those trained on .*: digit_3"):
        open_named("torch/image_folder", digits, "val", {"digit_0": 0, "digit_1": 1, "digit_2": 2})
