"""What a run takes for its images is said before it trains; a damaged one is never a dead end."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.odd_files import ODD_FILES
from support.runs import cli, command, ema_timm

from ema_timm.checkpoints.cards.text import card_text
from ema_timm.cli import main
from ema_timm.data.splits import open_both
from ema_timm.errors import UnreadableImageError, UserError
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.training.run import continue_run, finetune
from ema_timm.training.settings import FinetuneConfig
from ema_timm.training.step import TrainStep


@pytest.fixture
def data(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "data")


@pytest.fixture
def config(config, data):
    return dataclasses.replace(config, data_dir=str(data), epochs=2, lr=FinetuneConfig.lr)


def run(config, progress=False, **changes):
    return finetune(dataclasses.replace(config, **changes), progress=progress)


def test_what_is_taken_is_told_before_training(config, data, capsys):
    shutil.rmtree(data / "val" / "digit_3")
    shutil.copytree(data / "val", data / "Test")
    picture = next((data / "train" / "digit_0").iterdir())
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(picture)
    run(config, progress=True, epochs=1)
    told = capsys.readouterr().err.split("epoch 1/1")[0]
    there = len(list((data / "train" / "digit_0").iterdir()))
    here = len(list((data / "val" / "digit_0").iterdir()))
    assert f"of each class: digit_0 {there}+{here}, digit_1" in told
    assert "without validation images, which the accuracy does not include: digit_3" in told
    assert "train: 1 images have 16-bit grey" in told
    assert f"ema-timm evaluate {config.output} --data-dir {data} --split Test" in told


def test_evaluate_measures_the_test_folder(config, data):
    (data / "val").rename(data / "Test")
    shutil.copytree(data / "Test", data / "valid")
    run(config, epochs=1)
    measured = evaluate(
        EvaluateConfig(config.output, data_dir=str(data), split="test", device="cpu", workers=0),
        progress=False,
    )
    assert measured["evaluation"]["data"]["split"] == "Test"
    assert measured["metrics"]["images"] == 23


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    return content


def test_a_truncated_image_ends_the_run_before_it_starts(config, data, tmp_path):
    bad = sorted(data.glob("train/*/*.png"))[40]
    truncate(bad)
    with pytest.raises(UnreadableImageError, match=rf"read {bad}: .*\. Repair or remove it\.$"):
        run(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnreadableImageError, match=r"continue with --resume"):
        run(config, check=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_mid_run_loses_nothing(
    config, data, monkeypatch, tmp_path, workers
):
    """Restored, the run ends as one that was never interrupted; what the message says works."""
    config = dataclasses.replace(config, workers=workers)
    whole = run(config, output=str(tmp_path / "whole"))
    bad, content = sorted(data.glob("train/*/*.png"))[7], []
    step = TrainStep.__call__

    def breaking(self, images, targets, done):
        if done == 4:  # the last step of the first of two epochs
            content.append(truncate(bad))
        return step(self, images, targets, done)

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(UserError, match=rf"read {bad}.* Put the file back as it was and cont"):
        run(config)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=rf"read {bad}.*local-dir:{config.output} and another --out"
    ):
        continue_run({"output": config.output}, progress=False)
    other = bad.rename(tmp_path / "kept.png")
    more = run(config, model=f"local-dir:{config.output}", pretrained=True, epochs=1,
               output=str(tmp_path / "more"))  # fmt: skip
    assert more["data"]["train"]["images"] == 59
    other.unlink()
    bad.write_bytes(content[0])
    continued = continue_run({"output": config.output}, progress=False)
    assert continued["weights_sha256"] == whole["weights_sha256"]
    assert [e["loss"] for e in continued["history"]] == [e["loss"] for e in whole["history"]]


def test_a_flat_folder_is_divided_and_measured_alike(config, data, tmp_path):
    flat = str(data / "train")
    first = run(config, data_dir=flat, val_split="0.2", epochs=1)
    other = run(
        config, data_dir=flat, val_split="0.2", epochs=1, seed=7, output=str(tmp_path / "b")
    )
    assert first["data"] == other["data"]  # whatever the seed
    counts = first["data"]
    assert counts["train"]["images"] + counts["val"]["images"] == 60
    measured = evaluate(
        EvaluateConfig(config.output, data_dir=flat, val_split="0.2", device="cpu", workers=0),
        progress=False,
    )
    assert measured["metrics"]["correct"] == first["metrics"]["correct"]
    assert measured["evaluation"]["data"]["fingerprint"] == counts["val"]["fingerprint"]
    assert measured["evaluation"]["data"]["split"] == "0.2 set aside"
    assert json.dumps(measured).count(str(tmp_path)) == 0
    with pytest.raises(UserError, match="the images have changed since"):
        continue_run({"output": config.output, "val_split": "0.4"}, progress=False)


def test_another_folder_can_be_validated_on(config, data):
    (data / "val").rename(data / "dev")
    assert run(config, split="dev", epochs=1)["metrics"]["images"] == 23


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--val-split", "0.2"], "but {data}/val contains some. Leave --val-split out"),
        (["--val-split", "1.5"], "--val-split must be a fraction between 0 and 1"),
        (["--val-split", "val"], "got val. To choose a split by its name, use --split"),
        (["--val-split", "0.2", "--split", "val"], "--split val excludes --val-split 0.2"),
        (["--split", "nowhere"], "has no folder nowhere/"),
    ],
)
def test_a_split_that_cannot_be_gets_one_line(config, data, capsys, options, said):
    args = ["finetune", "--model", config.model, "--data-dir", config.data_dir]
    assert main([*args, "--output", config.output, *options]) == 2
    error = capsys.readouterr().err
    assert said.format(data=data) in error and len(error.splitlines()) == 1
    assert not Path(config.output).exists()


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_warns_before_training_and_its_card_says_so(data, config, capsys, count):
    copies = sorted((data / "train" / "digit_2").iterdir())[:count]
    for image in copies:
        shutil.copy(image, data / "val" / "digit_2")
    assert main(cli(config, "--epochs", 1)) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [i for i, line in enumerate(lines) if "are training images too" in line]
    card = (data.parent / "run" / "README.md").read_text("utf-8")
    if not count:
        assert not warned and "| Images | 23 |" in card
        return
    assert f"2 of the 25 validation images are training images too, such as {data}/val/digit_2/" \
        in lines[warned[0]]  # fmt: skip
    assert warned[0] < min(i for i, line in enumerate(lines) if line.startswith("epoch 1/"))
    assert "| Images | 25 (2 are training images too: expect less on new images) |" in card
    # Measured on other images, the accuracy is not of those.
    others = shutil.copytree(data / "val" / "digit_3", data / "test" / "digit_3").parent
    run = [str(data.parent / "run")]
    assert main(["evaluate", *run, "--data-dir", str(data), "--split", others.name]) == 0
    assert main(["card", *run]) == 0
    card = (data.parent / "run" / "README.md").read_text("utf-8")
    assert (
        "are training images too" not in card
        and f"| Images | {len(list(others.rglob('*.png')))}" in card
    )


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("check", ["--check", "--no-check"])
def test_what_is_no_file_does_not_hang(data, config, make, check):
    for split in ("train", "val"):
        make(data / split / "digit_0" / "x.png")
    done = subprocess.run(
        command(*cli(config, "--epochs", 1, "--workers", 1), check),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"{data}/train/digit_0/x.png: not a regular file" in last


def test_names_that_are_no_text_are_trained_on_and_measured(data, config, tmp_path):
    for split in ("train", "val"):
        image = next((data / split / "digit_0").iterdir())
        image.rename(image.with_name("caf\udce9.png"))
    odd, output = data.rename(tmp_path / "data\udce9"), tmp_path / "run"
    (odd / "val").rename(odd / "val\udce9")
    where = ["--data-dir", odd, "--split", "val\udce9"]
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    done = ema_timm(*cli(config, "--epochs", 1), *where, "--output", output, **strict)
    assert done.returncode == 0, done.stderr
    done = ema_timm("evaluate", output, *where, "--device", "cpu", "--workers", 0, **strict)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    text = card_text(json.loads((output / "results.json").read_text("utf-8")))
    assert r"`data\udce9/val\udce9`" in text and text.encode("utf-8")
    train, val = open_both(odd / "train", val_split="0.2")
    assert len(train) + len(val) == 60 and train.fingerprint() != val.fingerprint()


def test_an_output_that_safetensors_cannot_open_is_refused_at_once(config, capsys):
    assert main(cli(config, "--output", "run\udcff")) == 2
    assert r"--output run\udcff is not UTF-8" in capsys.readouterr().err
    assert not Path("run\udcff").exists()
