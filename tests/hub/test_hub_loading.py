"""What comes from the Hub is what the Hub holds; and it is trained on, in three ways."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from ema_timm.see import PredictConfig, predict
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model

TIMM_REPO = os.environ.get("TIMM_REPO")
NEW = (5, 6, 7)  # digits that the published model has never seen
BASE = "ada/base"


@pytest.fixture(scope="module")
def new_digits(tmp_path_factory):
    """An image folder of three other classes: 60 images to train on, 30 to validate."""
    from sklearn.datasets import load_digits

    from ema_timm.training.quickstart import write_image

    folder, data = tmp_path_factory.mktemp("new_digits"), load_digits()
    for target in NEW:
        for index, image in enumerate(data.images[data.target == target][:30]):
            split = "val" if index % 3 == 0 else "train"
            write_image(image, folder / split / f"new_{target}" / f"{index:04d}.png")
    return folder


@pytest.fixture
def hub(stage, trained):
    """A Hub that holds the trained folder, and a decoy that timm would go on to."""
    stage[0].heal()
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    stage[0].store.put(BASE, {**files, "pytorch_model.bin": b"a pickle"}, "Publish")
    return stage[0]


@pytest.fixture
def load(stage):
    return stage[1].load


def asked_for_a_pickle(hub):
    return any("pytorch_model" in path for _, path in hub.requests)


def test_our_names_load_from_the_hub_as_from_the_folder(hub, load, trained):
    from ema_timm.publishing.reload import fixed_logits, same

    here = fixed_logits(timm.create_model(f"local-dir:{trained}", pretrained=True))
    commit = hub.store.repos[BASE].resolve("main").oid
    for name in (f"hf-hub:{BASE}", f"hf-hub:{BASE}@{commit}"):
        assert same(load(name)["outputs"], here)


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "copies"])
def test_a_damaged_download_is_fetched_anew_or_refused(hub, load, symlinks):
    fault = hub.fault("storage", "corrupt", times=1)
    assert "outputs" in load(f"hf-hub:{BASE}", symlinks=symlinks)
    assert fault.hits == 1 and hub.count("storage") == 2
    fault.times = 10
    error = load(f"hf-hub:{BASE}", symlinks=symlinks)["error"]
    assert error.startswith("HubError: fetching model.safetensors (ada/base) gave a damaged file")
    hub.heal()
    assert "outputs" in load(f"hf-hub:{BASE}", keep_cache=True)  # it holds nothing damaged


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "copies"])
def test_what_is_in_the_cache_loads_offline(hub, load, symlinks):
    online = load(f"hf-hub:{BASE}", symlinks=symlinks)
    asked = len(hub.requests)
    again = load(f"hf-hub:{BASE}", symlinks=symlinks, keep_cache=True, offline=True)
    assert again == online and "outputs" in online
    assert len(hub.requests) == asked


@pytest.mark.parametrize("status", [403, 500])  # the client gives up at once, or after a while
def test_trouble_on_the_hub_does_not_lead_to_a_pickle(hub, load, status):
    hub.fault("head", status, match="model.safetensors")
    error = load(f"hf-hub:{BASE}")["error"]
    assert error.startswith("StepError: fetching model.safetensors (ada/base) ")
    assert not asked_for_a_pickle(hub)


PLAIN = "timm/test_resnet.r160_in1k"


@pytest.fixture
def plain(hub):
    """timm's own repository of the plain network that a warm start begins with."""
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet").state_dict()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return {"model.safetensors": save(weights), "pytorch_model.bin": buffer.getvalue()}


def test_a_warm_start_takes_only_what_the_hub_holds(hub, load, plain):
    hub.store.put(PLAIN, plain, "initial")
    start = load("test_resnet_ema")["outputs"]
    fault = hub.fault("storage", "corrupt")
    assert "gave a damaged file" in load("test_resnet_ema")["error"]
    assert fault.hits == 2
    hub.heal()
    hub.fault("head", 500, match="model.safetensors")
    assert load("test_resnet_ema")["error"].startswith("StepError: fetching")
    assert not asked_for_a_pickle(hub)
    assert len(start[0]) == 1000


def test_a_repository_of_pickles_alone_is_left_to_timm(hub, load, plain):
    pickles = "timm/test_resnet.r160_in1k"
    hub.store.repos.pop(pickles, None)
    hub.store.put(pickles, {"pytorch_model.bin": plain["pytorch_model.bin"]}, "old")
    assert "outputs" in load("test_resnet_ema")
    assert asked_for_a_pickle(hub)


def test_given_weights_replace_those_of_the_folder(trained, tmp_path):
    weights = {
        name: tensor + 1 for name, tensor in load_file(trained / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "other.safetensors")
    file = str(tmp_path / "other.safetensors")
    model, _ = create_model(InitialModel(f"local-dir:{trained}", {}, weights=file), 4)
    assert torch.equal(model.conv1[0].weight, weights["conv1.0.weight"])


def run_finetune(stage, data, output, *more, **settings):
    args = ["finetune", "--model", f"hf-hub:{BASE}", "--data-dir", data, "--output", output]
    args += ["--img-size", 32, "--batch-size", 12, "--workers", 0, "--device", "cpu"]
    return stage[1].run(*args, "--hflip", 0, *more, **settings)


def finetune(stage, data, output, *more):
    done = run_finetune(stage, data, output, *more)
    assert done["code"] == 0, done["err"]
    return json.loads((output / "results.json").read_text())


def test_a_full_disk_while_loading_is_named(stage, hub, new_digits, tmp_path):
    done = run_finetune(stage, new_digits, tmp_path / "run", largest_file=100_000)
    assert done["code"] == 1, done["err"]
    last = done["err"].strip().splitlines()[-1]
    assert last.startswith("ema-timm: ") and "Free space" in last
    assert not list(tmp_path.rglob("*.safetensors"))


def test_finetune_starts_from_published_weights_and_learns_new_classes(
    stage, hub, trained, new_digits, tmp_path
):
    finetune(stage, new_digits, tmp_path / "still", "--epochs", 1, "--lr", 1e-12)
    published = load_file(trained / "model.safetensors")
    still = load_file(tmp_path / "still" / "model.safetensors")
    torch.testing.assert_close(still["conv1.0.weight"], published["conv1.0.weight"])
    assert still["fc.weight"].shape[0] == 3
    results = finetune(stage, new_digits, tmp_path / "run", "--epochs", 8, "--lr", 4e-3)
    assert results["metrics"]["images"] == 30
    assert results["metrics"]["top1"] > 70  # of three classes: chance is 33
    assert results["classes"] == ["new_5", "new_6", "new_7"]
    assert results["base"]["hub_repository"] == BASE
    assert f"base_model: {BASE}" in (tmp_path / "run" / "README.md").read_text()
    assert not asked_for_a_pickle(hub)


TRAINER = """
import sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers import Trainer, TrainingArguments, set_seed

repo, data, output = sys.argv[1:]
set_seed(0)
names = sorted(folder.name for folder in Path(data, "val").iterdir())
config = AutoConfig.from_pretrained(
    repo, label_names=names, num_labels=len(names), id2label=dict(enumerate(names))
)
model = AutoModelForImageClassification.from_pretrained(
    repo, config=config, ignore_mismatched_sizes=True
)
processor = AutoImageProcessor.from_pretrained(repo)
start = model.timm_model.conv1[0].weight.detach().clone()

def examples(split):
    found = []
    for label, folder in enumerate(sorted(Path(data, split).iterdir())):
        for file in sorted(folder.iterdir()):
            pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values[0]
            found.append({"pixel_values": pixels, "labels": label})
    return found

arguments = TrainingArguments(
    output, num_train_epochs=8, per_device_train_batch_size=12, learning_rate=4e-3,
    report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    dataloader_pin_memory=False,
)
held_out = examples("val")
trainer = Trainer(
    model, arguments, train_dataset=examples("train"), eval_dataset=held_out,
    compute_metrics=lambda p: {"correct": int((p.predictions.argmax(-1) == p.label_ids).sum())},
)
trainer.train()
torch.save(start, output + "/start.pt")
trainer.save_model(output + "/saved")
print(trainer.evaluate()["eval_correct"], len(held_out))
"""


@pytest.mark.slow
def test_transformers_trainer_learns_new_classes(
    hub, hub_env, trained, new_digits, tmp_path, python
):
    out = python(TRAINER, args=[BASE, new_digits, tmp_path], env=hub_env(hub))
    correct, images = map(int, out.splitlines()[-1].split())
    assert images == 30 and correct > 21
    published = load_file(trained / "model.safetensors")["conv1.0.weight"]
    assert torch.equal(torch.load(tmp_path / "start.pt"), published)
    for digit in NEW:  # the saved folder has the new names, in the order of the labels
        folder = new_digits / "val" / f"new_{digit}"
        predicted = predict(PredictConfig(str(tmp_path / "saved"), [str(folder)]), progress=False)
        right = sum(row.label[0] == folder.name for row in predicted.rows)
        assert right > len(predicted.rows) / 2


@pytest.mark.slow
@pytest.mark.skipif(not TIMM_REPO, reason="set TIMM_REPO to a clone of timm to run this")
def test_timms_train_script_learns_new_classes(hub, hub_env, new_digits, tmp_path):
    shutil.copy(Path(TIMM_REPO) / "train.py", tmp_path)
    args = ["--data-dir", new_digits, "--model", f"hf-hub:{BASE}", "--pretrained"]
    args += ["--num-classes", 3, "--img-size", 32, "-b", 12, "-j", 0, "--device", "cpu"]
    args += ["--epochs", 8, "--lr", 4e-3, "--opt", "adamw", "--warmup-epochs", 1, "--hflip", 0]
    args += ["--output", "out", "--experiment", "a"]
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, args)],
        cwd=tmp_path,
        env={**os.environ, **hub_env(hub)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = csv.DictReader((tmp_path / "out" / "a" / "summary.csv").read_text().splitlines())
    assert max(float(row["eval_top1"]) for row in rows) > 70
    assert not asked_for_a_pickle(hub)
