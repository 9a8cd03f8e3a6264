"""What a setting says is done, and a run with it goes on exactly."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.runs import assert_same_outcome, cli, interrupt, run
from torch.nn.functional import cross_entropy

from ema_timm.cli import main
from ema_timm.errors import InterruptedRunError, UserError
from ema_timm.measure.metrics import Metrics
from ema_timm.options import option_name
from ema_timm.training.loss import mixup_and_loss, read_class_weights
from ema_timm.training.processes import Process
from ema_timm.training.quickstart import validate
from ema_timm.training.resume import RunState
from ema_timm.training.run import Run
from ema_timm.training.settings import FinetuneConfig
from ema_timm.training.step import TrainStep

ALL = {
    "grad_accum_steps": 2,
    "average_weights": 0.9,
    "freeze_epochs": 1,
    "class_weights": "balanced",
}


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"grad_accum_steps": 2}, 6),
        ({"average_weights": 0.9}, 7),
        ({**ALL, "clip_grad": 0.5, "mixup": 0.2}, 1),
        ({**ALL, "grad_accum_steps": 3}, 8),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_an_interrupted_run_continues_exactly(config, monkeypatch, tmp_path, settings, at):
    """Also between two batches of one step, and after the backbone was let go."""
    config = dataclasses.replace(config, epochs=2, **settings)
    whole = run(config, output=str(tmp_path / "whole"))
    interrupt(monkeypatch, at)
    with pytest.raises(InterruptedRunError):
        run(config)
    continued = run(config, resume=True)
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")


def test_a_setting_of_the_outcome_is_refused_on_resume(config, capsys):
    run(config, epochs=1)
    for setting, value in ALL.items():
        option = f"--{setting.replace('_', '-')}"
        assert main(["finetune", "--resume", "--output", config.output, option, str(value)]) == 2
        assert f"{option} is {value!r}, but the run was started" in capsys.readouterr().err


def test_a_run_that_is_older_than_a_setting_continues(config):
    first = run(config, epochs=1)
    saved = RunState(config.output)
    state = saved.load()
    for name in (*ALL, "patience", "record"):
        state["config"].pop(name)
        state["identity"]["arguments"].pop(name, None)
    for name in ("averaged", "gradients"):
        state.pop(name)
    state["identity"].pop("class_weights")
    saved.save(state)
    assert run(config, epochs=1, resume=True) == first
    assert len(run(config, epochs=2, resume=True)["history"]) == 2


def test_images_are_prepared_as_requested_in_training_and_afterwards(config, monkeypatch):
    """The mean of a batch shows the normalisation; a reload by name gets it from config.json."""
    step, seen = TrainStep.__call__, []

    def noted(self, images, targets, done):
        seen.append((float(images.min()), float(images.max())))
        return step(self, images, targets, done)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    requested = {"mean": [0.5], "std": [0.25], "interpolation": "bicubic", "crop_pct": 0.75}
    results = run(config, epochs=1, **requested)
    assert min(low for low, _ in seen) == pytest.approx(-2, abs=0.05)  # black
    assert max(high for _, high in seen) == pytest.approx(2, abs=0.2)  # white
    want = {**requested, "mean": [0.5] * 3, "std": [0.25] * 3}
    model = timm.create_model(f"local-dir:{config.output}", pretrained=True)
    for read in (results["input"], timm.data.resolve_model_data_config(model)):
        found = {name: read[name] for name in want}
        assert json.loads(json.dumps(found)) == want


def small_step(config, **changes):
    """A step of a network whose batches do not see each other."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, opt="sgd", smoothing=0.0, warmup_epochs=0, **changes)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    step = TrainStep(config, model, 4, 5, Process(0, 1, torch.device("cpu")))
    step.begin_epoch(0)
    return step


def test_gradients_of_several_batches_are_those_of_one_large_batch(config):
    images, targets = torch.randn(20, 3, 32, 32), torch.arange(20) % 4
    whole, parts = small_step(config), small_step(config, grad_accum_steps=2)
    before = parts.model.state_dict()["head.weight"].clone()
    whole(images[:8], targets[:8], 0)
    parts(images[:4], targets[:4], 0)
    assert torch.equal(parts.model.state_dict()["head.weight"], before) and parts.pending
    parts(images[4:8], targets[4:8], 1)
    assert not parts.pending
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    for batch in (2, 3, 4):  # the last step of an epoch is of the batches that are left
        parts(images[:4], targets[:4], batch)
    assert not parts.pending


def test_the_schedule_counts_steps_and_not_batches(config):
    step, rates = small_step(config, grad_accum_steps=2, epochs=2), []
    for batch in range(10):
        step(torch.randn(2, 3, 32, 32), torch.arange(2), batch)
        rates.append(step.lr)
    each = [rates[batch] for batch in (0, 2, 4, 5, 7, 9)]  # two epochs of two, two and one
    assert rates == [lr for lr, of in zip(each, (2, 2, 1) * 2, strict=True) for _ in range(of)]
    assert each == sorted(set(each), reverse=True) and each[-1] < 0.2 * each[0]


def test_averaged_weights_are_measured_and_kept(config, digits, tmp_path):
    results = run(config, average_weights=0.8, epochs=1)
    state, kept = RunState(config.output).load(), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(state["averaged"][name], tensor) for name, tensor in kept.items())
    assert not torch.equal(state["model"]["fc.weight"], kept["fc.weight"])
    assert "averaged weights (decay 0.8)" in (tmp_path / "run" / "README.md").read_text()
    model = timm.create_model(f"local-dir:{config.output}", pretrained=True)
    assert validate(model, digits)["correct"] == results["metrics"]["correct"]


def test_the_average_is_that_of_the_decay(config):
    step, images, targets = small_step(config, average_weights=0.75), torch.randn(8, 3, 32, 32), 4
    wanted = None
    for batch in range(3):
        step(images, torch.arange(8) % targets, batch)
        now = step.model.head.weight.detach()
        wanted = now.clone() if wanted is None else 0.75 * wanted + 0.25 * now
    torch.testing.assert_close(step.evaluated.head.weight, wanted)


def test_frozen_epochs_leave_the_backbone_as_it_was(config, tmp_path):
    torch.manual_seed(5)
    start = timm.create_model("test_resnet_ema", num_classes=4).state_dict()
    save_file(start, tmp_path / "start.safetensors")
    config.weights, config.pretrained = str(tmp_path / "start.safetensors"), True
    run(config, freeze_epochs=1, epochs=1, drop_path=0.1, grad_checkpointing=True)
    after = RunState(config.output).load()["model"]
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, start[name])}
    assert {name.partition(".")[0] for name in moved if ".se." not in name} == {"fc"}
    assert {"fc.weight", "layer1.0.se.conv1x1.weight", "layer4.0.se.conv3x3.weight"} <= moved
    run(config, output=str(tmp_path / "more"), freeze_epochs=1, epochs=2)
    thawed = RunState(tmp_path / "more").load()["model"]
    names = ("conv1.0.weight", "bn1.running_mean", "layer3.0.conv2.weight")
    assert not any(torch.equal(thawed[name], start[name]) for name in names)


@pytest.mark.long
def test_two_processes_with_every_setting_keep_one_network(config, tmp_path):
    """DDP is told anew what learns; the averages of both are of the same statistics."""
    more = [f"--{name.replace('_', '-')}={value}" for name, value in ALL.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    args = cli(config, "--epochs", 3, "--batch-size", 6, "--record", "csv", "--patience", 5, *more)
    done = subprocess.run(
        [*command, "2", "-m", "ema_timm", *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [entry["images"] for entry in results["history"]] == [23, 23, 23]
    state = RunState(config.output).load()
    assert not torch.equal(state["model"]["bn1.running_mean"], torch.zeros(96))
    rows = (tmp_path / "run" / "training" / "summary.csv").read_text().splitlines()
    assert len(rows) == 4


class Images:
    """The part of a data set that `read_class_weights` uses."""

    class_names = ("daisy", "rose", "tulip", "vetch")

    def class_counts(self):
        return [10, 40, 20, 10]


def test_balanced_weights_are_1_in_the_mean_over_the_images():
    weights, counts = read_class_weights("balanced", Images()), Images().class_counts()
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) == pytest.approx(80)
    assert len({round(w * n, 9) for w, n in zip(weights, counts, strict=True)}) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "must be an object"),
        ('{"daisy": 1, "rose": 1, "tulip": 1, "weed": 1}', "only one of the two has vetch, weed"),
        ('{"daisy": 1, "rose": 1, "tulip": "2", "vetch": 1}', "'tulip' has '2'"),
        ('{"daisy": 1, "rose": 0, "tulip": 1, "vetch": 1}', "'rose' has 0"),
        (None, "cannot read .*weights.json"),
    ],
)
def test_class_weights_that_cannot_be_are_refused(tmp_path, text, said):
    file = tmp_path / "weights.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_class_weights(str(file), Images())


def test_class_weights_are_in_the_loss_the_results_and_the_identity(config, tmp_path, capsys):
    names = [f"digit_{n}" for n in range(4)]
    file, given = tmp_path / "weights.json", dict(zip(names, (3.0, 1.0, 1.0, 0.5), strict=True))
    file.write_text(json.dumps(given))
    results = run(config, epochs=1, class_weights=str(file))
    assert results["class_weights"] == given
    assert results["arguments"]["class_weights"] == "weights.json"
    assert (
        results["history"][0]["train_loss"]
        != run(config, epochs=1, output=str(tmp_path / "plain"))["history"][0]["train_loss"]
    )
    file.write_text(json.dumps({**given, "digit_0": 2.0}))
    assert main(["finetune", "--resume", "--output", config.output, "--epochs", "2"]) == 2
    assert "the numbers of --class-weights have changed" in capsys.readouterr().err


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_the_weighted_loss_is_its_definition(mixup):
    weights, logits = torch.tensor([3.0, 1.0, 1.0, 0.5]), torch.randn(8, 4)
    targets = torch.arange(8) % 4
    _, loss = mixup_and_loss(4, mixup, class_weights=weights)
    each = weights[targets] * cross_entropy(logits, targets, reduction="none")
    if mixup:  # PyTorch's mean over soft targets is over the images
        soft = torch.nn.functional.one_hot(targets, 4).float()
        torch.testing.assert_close(loss(logits, soft), each.mean())
    else:
        torch.testing.assert_close(loss(logits, targets), each.sum() / weights[targets].sum())


@pytest.fixture
def constant(monkeypatch):
    """No epoch is better than the first."""
    metrics = Metrics(top1=25.0, top5=None, balanced_accuracy=25.0, loss=1.5, correct=6, images=24)
    monkeypatch.setattr(Run, "_evaluate", lambda self, *_: metrics)


def test_a_run_without_progress_ends_early_and_goes_on_with_more_patience(
    config, tmp_path, constant, capsys
):
    args = ["finetune", "--resume", "--output", config.output]
    assert main(cli(config, "--epochs", 9, "--patience", 1)) == 0
    assert "better than 1 in the last 1: the run ends after 2 of 9" in capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stopped_early"] == {"epoch": 2, "patience": 1} and results["best_epoch"] == 1
    assert "It ended after epoch 2" in (tmp_path / "run" / "README.md").read_text()
    again = run(config, epochs=9, patience=1, resume=True)  # it is finished
    assert json.loads(json.dumps(again)) == results
    assert main([*args, "--patience", "2"]) == 0
    whole = run(config, output=str(tmp_path / "whole"), epochs=9, patience=2)
    continued = json.loads((tmp_path / "run" / "results.json").read_text())
    assert continued["stopped_early"] == {"epoch": 3, "patience": 2}
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")
    assert main([*args, "--epochs", "12"]) == 0
    extended = json.loads((tmp_path / "run" / "results.json").read_text())
    assert extended["extended_after"] == [3]
    assert extended["stopped_early"] == {"epoch": 5, "patience": 2}


def test_logs_hold_every_epoch_once_whatever_interrupts(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(config, epochs=3, record=["csv", "tensorboard"])
    folder = tmp_path / "run" / "training"
    interrupt(monkeypatch, 8)
    with pytest.raises(InterruptedRunError):
        run(config)
    with open(folder / "summary.csv", "a") as table:
        table.write("2,half")  # what a killed run could have left
    results = run(config, resume=True)
    with open(folder / "summary.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for entry, row, event in zip(
        results["history"], rows, board.Scalars("loss/validation"), strict=True
    ):
        assert float(row["eval_loss"]) == entry["loss"] and float(row["lr"]) == entry["lr"]
        assert float(row["train_loss"]) == entry["train_loss"]
        assert event.step == entry["epoch"] and event.value == pytest.approx(entry["loss"])


def test_tensorboard_that_is_missing_is_said_before_training(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ema_timm.errors.find_spec", lambda name: None)
    assert main(cli(config, "--record", "csv", "tensorboard")) == 2
    assert "pip install 'ema-timm[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--grad-accum-steps", "0"], "--grad-accum-steps must be at least 1"),
        (["--patience", "-1"], "--patience must be at least 0, got -1"),
        (["--average-weights", "1"], "--average-weights must be at least 0 and below 1, got 1.0"),
        (["--model-kwargs", "num_classes=7"], "num_classes is not an argument of the network"),
        (["--model-kwargs", "pretrained=True"], "pretrained is not an argument of the network"),
        (["--model-kwargs", "features_only=True"], "features_only is not an argument of"),
        (["--model-kwargs", "global_pool="], "test_resnet_ema cannot run on an image of 3×32×32"),
        (["--model-kwargs", "drop_rate=2"], "Correct --img-size or --model-kwargs."),
        (["--class-weights", "gone.json"], "must be balanced or a JSON file"),
        (["--mean", "0.5", "0.5"], "--mean must be one number, or one for each of the 3 channels"),
        (["--std", "0"], "std must be numbers above 0, one a channel, got [0.0]"),
    ],
)
def test_settings_that_cannot_be_get_one_line(config, capsys, changes, said):
    assert main(cli(config, *changes)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "setting", [each for each in fields(FinetuneConfig) if type(each.default) in (int, float)]
)
def test_every_number_has_a_range(setting, config, tmp_path, capsys):
    flag = option_name(setting.name)
    values = ["-1", "nan", "inf"] if isinstance(setting.default, float) else ["-1"]
    for value in values:
        assert main(cli(config, f"{flag}={value}")) == 2
        assert f"ema-timm: {flag} must be at least" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["smoothing", "drop-path", "momentum", "reprob", "crop-pct"])
def test_a_fraction_above_one_is_refused(option, config, capsys):
    assert main(cli(config, f"--{option}", "1.5")) == 2
    assert "1, got 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["train/0", "train/new", "val"])
def test_an_output_among_the_images_is_refused(inside, config, digits, capsys):
    folder = digits / inside / "run"
    assert main(cli(dataclasses.replace(config, output=str(folder)))) == 2
    assert f"is inside {digits / inside.split('/')[0]}, so its figures" in capsys.readouterr().err
    assert not folder.exists()


def test_class_weights_may_have_a_byte_order_mark(tmp_path):
    file = tmp_path / "weights.json"
    content = json.dumps(dict.fromkeys(Images.class_names, 2))
    file.write_text(content, encoding="utf-8-sig")
    assert len(read_class_weights(str(file), Images())) == 4


def test_an_argument_that_is_none_is_the_default_also_of_the_folder(config, tmp_path):
    assert main(cli(config, "--model-kwargs", "ema_groups=None", "--epochs", "1")) == 0
    assert main(["predict", config.output, config.data_dir + "/val", "--device", "cpu"]) == 0


def test_a_batch_of_which_batch_norm_has_no_variance_is_one_line(config, capsys):
    assert main([*cli(config), "--batch-size", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        "ema-timm: a batch of 1 image(s) of 32×32 pixels gives a layer one value"
    )
    assert said.endswith("Use a larger --batch-size or --img-size.")
