"""The card says what was measured, and nothing that was not."""

import copy
import re
import shutil
import subprocess
import sys

import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import resolve_data_config

from ema_timm.checkpoints.cards.file import EditedCardError, write_card
from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.cli import main

RESULTS = {
    "architecture": "resnet18_ema",
    "base": {
        "model": "resnet18_ema",
        "weights": "timm/resnet18.a1_in1k",
        "hub_repository": "timm/resnet18.a1_in1k",
        "license": "apache-2.0",
    },
    "metrics": {"top1": 87.5, "top5": None, "loss": 0.4321, "correct": 7, "images": 8},
    "best_epoch": 3,
    "parameters": 11_696_552,
    "macs": {"total": 1_822_225_664, "ema": 8_152_320, "ema_definition": 30_836_736},
    "classes": ["cat", "dog"],
    "input": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
    },
    "data": {"train": {"images": 40}, "val": {"images": 8, "fingerprint": "f" * 64}},
    "history": [{"epoch": 1}],
    "arguments": {
        "opt": "adamw",
        "lr": 5e-4,
        "weight_decay": 0.05,
        "epochs": 4,
        "batch_size": 8,
        "sched": "cosine",
        "smoothing": 0.1,
        "seed": 42,
        "data_dir": "pets",
    },
    "plots": ["curves.png"],
    "versions": {"timm": "1.0.31"},
    "device": "cpu",
}
EVALUATION = {
    "data": {"name": "pets2", "split": "test", "images": 9, "fingerprint": "e" * 64},
    "per_class": {"cat": {"images": 4, "correct": 3}, "dog": {"images": 5, "correct": 5}},
    "dtype": "float32",
    "amp_dtype": "bfloat16",
    "device": "cuda",
    "batch_size": 64,
    "versions": {"timm": "1.0.30"},
}


def test_numbers_are_those_of_the_results():
    text = card_text(RESULTS)
    for said in (
        "87.50% (7 of 8)", "0.4321", "11,696,552", "1,822,225,664", "8,152,320", "30,836,736",
        "3×224×224", "`cat`, `dog`", "epoch 3", "on 40 images", "![loss and accuracy](curves.png)",
    ):  # fmt: skip
        assert said in text
    assert "Top-5" not in text and "confusion" not in text
    assert "$" not in text and "None" not in text.replace("[None]", "")
    assert "More Information Needed" not in text


def test_how_it_was_measured_is_said_where_it_is_known():
    text = card_text({**RESULTS, "evaluation": EVALUATION})
    for said in (
        "9 images of `pets2/test`", "bicubic interpolation, crop 0.95", "autocast to bfloat16",
        "on cuda", "timm 1.0.30", "| `cat` | 3 of 4 |", "| `dog` | 5 of 5 |",
    ):  # fmt: skip
        assert said in text
    # The epoch was chosen on other images than these.
    assert "The epoch was chosen" in card_text(RESULTS)
    assert "The epoch was chosen" not in text


def test_what_is_unknown_is_left_out():
    always = ("architecture", "parameters", "classes", "input")
    text = card_text({key: RESULTS[key] for key in always})
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    for absent in ("trained", "measured on", "Multiply", "Top-1", "None", "![", "\n\n\n"):
        assert absent not in text.partition("## How to load")[0].partition("# Model card")[2]


def test_same_results_give_the_same_text_and_are_not_touched():
    results = copy.deepcopy(RESULTS)
    assert card_text(results) == card_text(results)
    assert results == RESULTS


def test_the_metadata_are_those_that_the_hub_reads():
    told = {"repo_id": "me/pets", "datasets": ["me/photos"], "license": "mit"}
    metrics = {**RESULTS["metrics"], "top5": 100.0}
    card = ModelCard(card_text({**RESULTS, "metrics": metrics, "card": told}))
    data = card.data
    assert data.library_name == "timm" and data.pipeline_tag == "image-classification"
    assert data.base_model == "timm/resnet18.a1_in1k"
    assert data.license == "mit" and data.datasets == ["me/photos"]
    assert {"timm", "transformers", "ema-attention"} <= set(data.tags)
    assert data.model_name == "pets"
    found = {(e.metric_type, e.metric_value, e.dataset_type) for e in data.eval_results}
    assert found == {
        ("accuracy", 0.875, "me/photos"),
        ("top_5_accuracy", 1.0, "me/photos"),
        ("loss", 0.4321, "me/photos"),
    }
    assert '"hf-hub:me/pets"' in card.text and '"me/pets"' in card.text


def test_without_a_data_set_on_the_hub_the_folder_is_named():
    (first, *_) = ModelCard(card_text(RESULTS)).data.eval_results
    assert (first.dataset_type, first.dataset_name) == ("imagefolder", "pets")
    assert first.dataset_split == "val"


def test_names_that_yaml_and_tables_would_misread():
    evaluation = {**EVALUATION, "data": {**EVALUATION["data"], "name": "a: [b"}}
    evaluation["per_class"] = {"a|b": {"images": 4, "correct": 3}}
    results = {**RESULTS, "classes": ["no", 'say "hi"'], "evaluation": evaluation}
    text = card_text(results)
    assert ModelCard(text).data.eval_results[0].dataset_name == "a: [b"
    assert "| `a`&#124;`b` | 3 of 4 |" in text and '`say "hi"`' in text


@pytest.mark.parametrize("architecture", ["resnet18_ema", "resnet18"])
def test_only_ema_networks_claim_ema(architecture):
    results = {**RESULTS, "architecture": architecture}
    results["base"] = {**RESULTS["base"], "hub_repository": None, "license": None}
    text = card_text(results)
    ema = architecture.endswith("_ema")
    assert ("ICASSP" in text) == ema
    assert ("pip install ema-timm" in text) == ema
    assert "license:" not in text and "base_model:" not in text


def test_images_are_read_in_the_channels_of_the_network():
    assert 'convert("RGB")' in card_text(RESULTS)
    grey = card_text({**RESULTS, "input": {**RESULTS["input"], "input_size": [1, 32, 32]}})
    assert 'convert("L")' in grey and 'convert("RGB")' not in grey


def test_an_edit_anywhere_breaks_the_seal():
    text = card_text(RESULTS)
    assert is_generated(text)
    for edited in (
        text.replace("cat", "car"), text + "more\n", text[:-1], text.replace("\n\n", "\n", 1),
        text[: text.index("<!-- ema-timm card")], "", "x" + text,
    ):  # fmt: skip
        assert not is_generated(edited)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with results, and no card yet."""
    folder = CheckpointWriter(tmp_path_factory.mktemp("card") / "run")
    folder.make()
    model = timm.create_model("test_resnet_ema", num_classes=2)
    data = {**resolve_data_config(model=model), "input_size": (3, 32, 32)}
    digest = folder.save_model(model, {}, data, ["cat", "dog"])
    more = {"architecture": "test_resnet_ema", "weights_sha256": digest, "plots": []}
    folder.write_json("results.json", {**RESULTS, **more, "input": data})
    return folder.path


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def test_regenerating_changes_nothing(folder):
    assert write_card(folder).changed
    before = {p.name: (p.read_bytes()) for p in folder.iterdir() if p.is_file()}
    assert not write_card(folder).changed
    assert before == {p.name: (p.read_bytes()) for p in folder.iterdir() if p.is_file()}


def test_what_was_told_once_is_kept(folder):
    first = write_card(folder, {"license": "mit"})
    assert first.unknown == ["datasets"]
    text = (folder / "README.md").read_text()
    assert not write_card(folder).changed
    assert write_card(folder, {"datasets": ["me/photos"]}).unknown == []
    assert "license: mit" in text and "license: mit" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repo-id", "a/b; rm -rf ~"], "--repo-id 'a/b; rm -rf ~': Repo id must use"),
        (["--repo-id", "flowers"], "--repo-id must be USER/NAME, got 'flowers'"),
        (["--base-model", "a/b c"], "--base-model 'a/b c': Repo id"),
        (["--trained-on", "me/photos", "--trained-on", "my photos"], "--trained-on 'my photos'"),
        (["--license", "MIT License"], "--license must be an identifier of the Hub in lower case"),
        (["--license", "other", "--license-link", "javascript:alert(1)"], "--license-link must be"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_and_not_kept(folder, capsys, options, said):
    before = (folder / "results.json").read_bytes()
    assert main(["card", str(folder), *options]) == 2
    assert said in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before


def test_an_edited_card_is_kept_unless_forced_and_the_difference_shown(folder, capsys):
    write_card(folder)
    card = folder / "README.md"
    generated = card.read_text()
    card.write_text(generated.replace("## Limits", "## My limits"))
    with pytest.raises(EditedCardError):
        write_card(folder)
    assert main(["card", str(folder)]) == 2
    printed = capsys.readouterr()
    assert "-## My limits" in printed.out and "+## Limits" in printed.out
    assert "edited by hand and is kept" in printed.err
    assert "My limits" in card.read_text()
    assert main(["card", str(folder), "--force"]) == 0
    assert card.read_text() == generated


def test_a_card_that_is_no_text_is_kept_also_where_forced(folder, capsys):
    (folder / "README.md").write_bytes(b"\xff")
    assert main(["card", str(folder), "--force"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == b"\xff"
    (folder / "README.md").unlink()  # the remedy
    assert main(["card", str(folder)]) == 0


def test_results_of_other_weights_get_no_card(folder, capsys):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["card", str(folder)]) == 2
    assert "does not belong to model.safetensors" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_the_command_names_what_nobody_has_told(folder, capsys):
    assert main(["card", str(folder)]) == 0
    assert "datasets: not set; use --trained-on\n" == capsys.readouterr().err
    args = [
        "card",
        str(folder),
        "--trained-on",
        "me/a",
        "--trained-on",
        "me/b",
        "--repo-id",
        "me/x",
    ]
    assert main(args) == 0
    assert capsys.readouterr().err == ""  # the base's licence is known
    data = ModelCard((folder / "README.md").read_text()).data
    assert data.datasets == ["me/a", "me/b"]


def test_the_code_in_the_card_runs(folder, tmp_path):
    write_card(folder)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("PATH/TO/THIS/FOLDER", str(folder))
    code += "\nassert logits.shape == (1, 2)\n"
    # What the card says of 16-bit greyscale, in a line of its own.
    Image.frombytes("I;16", (40, 30), (200 * 257).to_bytes(2, "little") * 1200).save(
        tmp_path / "image.png"
    )
    inline = re.findall(r"`((?:from|read_image\()[^`]+)`", (folder / "README.md").read_text())
    code += f"{inline[1]}\nassert {inline[0]}.getpixel((0, 0)) == (200, 200, 200)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("cat", "dog")
