"""A comparison from its commands to its table, on a tiny network and tiny images."""

import csv
import json
import shlex
import shutil

import pytest
import torch
from PIL import Image
from support.runs import interrupt, run

from ema_timm.cli import main
from ema_timm.compare.runs import plan_runs
from ema_timm.compare.settings import make_comparison
from ema_timm.compare.variants import read_variants
from ema_timm.errors import InterruptedRunError
from ema_timm.training.step import TrainStep


@pytest.fixture(scope="module")
def tested_digits(digits, tmp_path_factory):
    """The small image folder, with images to test on that are half of those to validate on."""
    folder = shutil.copytree(digits, tmp_path_factory.mktemp("tested") / "digits")
    for path in sorted((folder / "val").glob("*/*.png"))[::2]:
        kept = folder / "test" / path.parent.name / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
    return folder


def settings(data_dir, output):
    return {
        "model": "test_resnet",
        "data_dir": str(data_dir),
        "output": str(output),
        "pretrained": False,
        "img_size": 32,
        "epochs": 1,
        "batch_size": 12,
        "device": "cpu",
        "workers": 0,
    }


def arguments(data_dir, output, *more):
    return [
        "compare", "--model", "test_resnet", "--data-dir", str(data_dir), "--output", str(output),
        "--no-pretrained", "--img-size", "32", "--epochs", "1", "--batch-size", "12",
        "--device", "cpu", "--workers", "0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tested_digits, tmp_path_factory):
    """A comparison whose runs were trained elsewhere, and collected."""
    output = tmp_path_factory.mktemp("compared") / "compare"
    comparison = make_comparison(settings(tested_digits, output), ["none", "se"], 2)
    for each in plan_runs(comparison, read_variants(comparison.attention, "test_resnet")):
        run(each.config)
    assert main(arguments(tested_digits, output, "--attention", "none", "se", "--seeds", "2",
                          "--collect")) == 0  # fmt: skip
    return output


def read(output):
    return json.loads((output / "compare.json").read_text())


def test_every_number_is_one_of_a_results_json(compared):
    table = read(compared)
    assert [row["variant"] for row in table["rows"]] == ["none", "se"]
    assert table["images"] == {"train": 60, "val": 23, "test": 12, "measured_on": "test"}
    top1 = {"none": [], "se": []}
    for entry in table["runs"]:
        results = json.loads((compared / entry["folder"] / "results.json").read_text())
        assert results["evaluation"]["data"]["split"] == "test"
        assert {key: entry[key] for key in results["metrics"]} == results["metrics"]
        assert entry["weights_sha256"] == results["weights_sha256"]
        assert entry["images_per_second"] == results["history"][0]["images_per_second"]
        assert entry["peak_memory_mib"] == results["history"][0]["peak_memory_mib"]
        top1[entry["variant"]].append(100 * results["metrics"]["correct"] / 12)
    none, se = table["rows"]
    assert se["top1"]["mean"] == pytest.approx(sum(top1["se"]) / 2)
    differences = [a - b for a, b in zip(top1["se"], top1["none"], strict=True)]
    assert se["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert se["difference"]["pairs"] == 2
    assert none["start"] == se["start"] == "random start"
    assert se["parameters"] > none["parameters"]


def test_table_csv_and_picture_hold_the_rows(compared):
    with Image.open(compared / "compare.png") as picture:
        assert picture.format == "PNG"
    rows = list(csv.DictReader((compared / "compare.csv").read_text().splitlines()))
    table = read(compared)
    assert [float(row["top1_mean"]) for row in rows] == [r["top1"]["mean"] for r in table["rows"]]
    text = (compared / "compare.md").read_text()
    for row in table["rows"]:
        assert f"| `{row['variant']}` | {row['top1']['mean']:.2f} ± " in text
    assert table["rows"][1]["difference"]["verdict"] == "needs 3 seeds"
    assert "needs 3 seeds" in text
    per_class = [
        [100 * c["correct"] / c["images"] for c in each["per_class"].values()]
        for each in (
            json.loads((compared / f"none-seed{seed}" / "results.json").read_text())["evaluation"]
            for seed in (42, 43)
        )
    ]
    balanced = [sum(each) / len(each) for each in per_class]
    assert float(rows[0]["balanced_accuracy_mean"]) == pytest.approx(sum(balanced) / 2)
    assert str(compared.parent) not in (compared / "compare.json").read_text()


def test_two_variants_differ_in_their_layer_alone(compared):
    """Same images, order and settings: what results.json says of both is the same otherwise."""
    plain, se = (
        json.loads((compared / f"{name}-seed42" / "results.json").read_text())
        for name in ("none", "se")
    )
    assert se["arguments"].pop("model_kwargs") == {"attn": "se"}
    assert plain["arguments"].pop("model_kwargs") == {}
    for name in ("model", "output"):
        assert plain["arguments"].pop(name) != se["arguments"].pop(name)
    assert plain["arguments"] == se["arguments"]
    assert plain["data"] == se["data"]
    assert "EMA attention" not in (compared / "se-seed42" / "README.md").read_text()


def test_one_seed_gives_every_variant_the_same_batches(tested_digits, tmp_path, monkeypatch):
    comparison = make_comparison(
        settings(tested_digits, tmp_path / "compare"), ["none", "coord"], 1
    )
    step, seen = TrainStep.__call__, []

    def noted(self, images, targets, done):
        seen[-1].append((images.clone(), targets.clone()))
        return step(self, images, targets, done)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    for each in plan_runs(comparison, read_variants(comparison.attention, "test_resnet")):
        seen.append([])
        run(each.config)
    assert len(seen[0]) == 5
    for one, other in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_list_prints_a_command_for_each_run_that_is_not_done(compared, tmp_path, capsys):
    copy = shutil.copytree(compared, tmp_path / "compare")
    shutil.rmtree(copy / "se-seed43")
    data_dir = json.loads((copy / "plan.json").read_text())["settings"]["data_dir"]
    assert main(["compare", "--list", "--output", str(copy), "--seeds", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[:2] == ["ema-timm", "finetune"]
    assert main(words[1:]) == 0
    assert main(["compare", "--list", "--output", str(copy)]) == 0
    assert main(["compare", "--collect", "--output", str(copy), "--data-dir", data_dir]) == 0
    first, again = read(compared), read(copy)
    kept = [(run["variant"], run["seed"], run["weights_sha256"]) for run in again["runs"]]
    assert kept == [(run["variant"], run["seed"], run["weights_sha256"]) for run in first["runs"]]
    assert [r["top1"] for r in again["rows"]] == [r["top1"] for r in first["rows"]]


def test_goes_on_with_what_was_begun_and_says_why_a_variant_failed(
    compared, tmp_path, capsys, monkeypatch
):
    """What is done stays as it is; what was begun ends as if it had not been interrupted."""
    output = shutil.copytree(compared, tmp_path / "compare")
    want = json.loads((output / "se-seed42" / "results.json").read_text())["weights_sha256"]
    shutil.rmtree(output / "se-seed42")
    comparison = make_comparison({"output": str(output)}, None, 1)
    begun = plan_runs(comparison, read_variants(comparison.attention, "test_resnet"))[-1]
    interrupt(monkeypatch, 2)
    with pytest.raises(InterruptedRunError):
        run(begun.config)
    done = (output / "none-seed42" / "model.safetensors").stat().st_mtime_ns
    more = ["--attention", "bottleneck", "none", "se", "--seeds", "1"]
    code = main(["compare", "--output", str(output), *more])
    assert code == 1
    said = capsys.readouterr()
    assert "2 of 3 runs to do" in said.err
    assert "[2/2] se, seed 42: top-1" in said.err
    failing, _, se = read(output)["rows"]
    assert "top1" not in failing
    assert len(failing["why_not"]) == 1
    assert failing["why_not"][0].startswith("seed 42: cannot build test_resnet_ema: timm's")
    assert "`bottleneck` |" in said.out
    assert se["seeds"] == [42]
    assert read(output)["runs"][-1]["weights_sha256"] == want
    assert (output / "none-seed42" / "model.safetensors").stat().st_mtime_ns == done


def other_images(results):
    results["data"]["train"]["fingerprint"] = "0" * 64


def other_weights(results):
    results["base"]["sha256"] = "0" * 64


def weighted_classes(results):
    results["class_weights"] = {"0": 2.0}


def two_processes(results):
    results["processes"] = 2


def extended(results):
    results["extended_after"] = [1]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_images, "train images"),
        (other_weights, "initial weights"),
        (weighted_classes, "class weights"),
        (two_processes, "numbers of processes"),
        (extended, "extensions after the last epoch"),
    ],
)
def test_runs_under_other_conditions_are_left_out(compared, tmp_path, change, what):
    output = shutil.copytree(compared, tmp_path / "compare")
    for name in ("none-seed42", "se-seed42"):
        file = output / name / "results.json"
        results = json.loads(file.read_text())
        results["base"]["sha256"] = "1" * 64  # as if trained from a file
        if name == "se-seed42":
            change(results)
        file.write_text(json.dumps(results))
    main(["compare", "--collect", "--output", str(output)])
    (se,) = [row for row in read(output)["rows"] if row["variant"] == "se"]
    assert se["seeds"] == [43]
    assert se["why_not"] == [f"seed 42: its {what} differ from those of none-seed42"]
    assert "| seeds |" in (output / "compare.md").read_text()


def test_other_patience_is_refused(compared, capsys):
    """It changes when a run ends, and so its result."""
    assert main(["compare", "--collect", "--output", str(compared), "--patience", "1"]) == 2
    assert "--patience is 1, but the runs in" in capsys.readouterr().err


def test_what_every_run_needs_is_checked_once(tested_digits, tmp_path, capsys):
    """Without weights no run can start: one error instead of an empty table."""
    command = arguments(tested_digits, tmp_path / "compare", "--attention", "none", "se")
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no weights")
    command.remove("--no-pretrained")
    assert main([*command, "--weights", str(wrong)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("wrong.safetensors cannot be read") == 1
    assert not (tmp_path / "compare" / "logs").exists()


def test_a_folder_trained_with_other_settings_is_refused(compared, tmp_path, capsys):
    output = shutil.copytree(compared, tmp_path / "compare")
    comparison = json.loads((output / "plan.json").read_text())
    comparison["settings"]["lr"] = 0.1
    (output / "plan.json").write_text(json.dumps(comparison))
    assert main(["compare", "--collect", "--output", str(output)]) == 2
    assert "was trained with --lr 0.0005, but this comparison has 0.1" in capsys.readouterr().err


def test_latencies_are_measured_on_request(compared, tmp_path):
    output = shutil.copytree(compared, tmp_path / "compare")
    assert main(["compare", "--collect", "--latency", "--output", str(output)]) == 0
    table = read(output)
    assert set(table["latency"]["ms"]) == {"none", "se"}
    assert "latency (ms)" in (output / "compare.md").read_text()


@pytest.mark.long
def test_latencies_of_exported_networks(compared, tmp_path):
    output = shutil.copytree(compared, tmp_path / "compare")
    assert main(["compare", "--collect", "--exported-latency", "--output", str(output)]) == 0
    table = read(output)
    assert set(table["exported_latency"]["ms"]) == {"none", "se"}
    assert "latency, ONNX (ms)" in (output / "compare.md").read_text()
