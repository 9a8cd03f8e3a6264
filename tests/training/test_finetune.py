"""Fine-tuning: real learning, exact continuation, clear refusals."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.runs import assert_same_outcome, cli, run
from support.worker import Worker
from timm.data import resolve_data_config

from ema_timm.backbones.registry import TIMM_VERSION
from ema_timm.checkpoints import folder
from ema_timm.checkpoints.config import STUB
from ema_timm.cli import main
from ema_timm.errors import InterruptedRunError
from ema_timm.files import sha256, write_whole
from ema_timm.measure.metrics import Tally
from ema_timm.training import resume
from ema_timm.training.quickstart import validate
from ema_timm.training.resume import RunState
from ema_timm.training.seeding import RepeatableImages
from ema_timm.training.step import TrainStep


def test_the_package_exports_the_function_and_imports_torch_only_for_it(python):
    code = (
        "import sys; from ema_timm.training import FinetuneConfig\n"
        "assert FinetuneConfig().epochs == 20 and 'torch' not in sys.modules\n"
        "import ema_timm.training.run, ema_timm.training as training\n"
        "assert training.finetune is training.run.finetune\n"
        "assert training.continue_run is training.run.continue_run\n"
        "assert not hasattr(training, 'anything_else')"
    )
    python(code)


def test_learns_and_writes_a_checkpoint_that_reloads(config, digits, tmp_path):
    results = run(config, epochs=8)
    folder = tmp_path / "run"
    written = {p.name for p in folder.iterdir()}
    assert written == {
        "model.safetensors", "config.json", STUB, "results.json", "README.md", "curves.png",
        "training",
    }  # fmt: skip
    on_disk = json.loads((folder / "results.json").read_text())
    assert on_disk == json.loads(json.dumps(results))
    metrics = results["metrics"]
    assert metrics["top1"] > 60  # four classes: chance is 25
    assert metrics["images"] == 23
    assert metrics["top1"] == pytest.approx(100 * metrics["correct"] / 23)
    assert len(results["history"]) == 8
    assert metrics["top1"] == max(entry["top1"] for entry in results["history"])
    for entry in results["history"]:  # 60 images fill five batches of 12
        assert 60 / entry["images_per_second"] == pytest.approx(entry["seconds"], abs=0.01)
        assert 50 < entry["peak_memory_mib"] < 50_000
    assert results["weights_sha256"] == sha256(folder / "model.safetensors")
    assert results["classes"] == ["digit_0", "digit_1", "digit_2", "digit_3"]
    assert results["data"]["train"]["images"] == 60
    assert set(results["versions"]) == {"ema_timm", "timm", "torch", "python"}
    with Image.open(folder / "curves.png") as picture:
        assert picture.format == "PNG"
    card = (folder / "README.md").read_text()
    assert f"({metrics['correct']} of 23)" in card
    assert "not an exponential moving average" in card
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert validate(model, digits) == {"correct": metrics["correct"], "images": 23}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 5, 7])
def test_interrupted_run_continues_exactly(config, monkeypatch, tmp_path, at, workers):
    """Ctrl-C at the first step, at the end of an epoch and in the middle of one."""
    config = dataclasses.replace(config, workers=workers, drop_path=0.1, mixup=0.2, reprob=0.2)
    whole = run(config, output=str(tmp_path / "whole"))
    step, steps = TrainStep.__call__, []

    def interrupted(self, *batch):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    with pytest.raises(InterruptedRunError):
        run(config)
    assert len(steps) == at
    continued = run(config, resume=True)
    assert len(steps) == 3 * 5
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")


@pytest.mark.parametrize("lost", ["results.json", "README.md", "training/state.pt"])
def test_killed_between_two_files_the_epoch_is_repeated(config, monkeypatch, tmp_path, lost):
    whole = run(config, output=str(tmp_path / "whole"))
    calls = []

    class KilledError(BaseException):
        pass

    def killed(final, write, **more):
        name = final.relative_to(config.output).as_posix()
        calls.append(name)
        if name == lost and calls.count(name) == 2:
            raise KilledError
        return write_whole(final, write, **more)

    for module in (folder, resume):
        monkeypatch.setattr(module, "write_whole", killed)
    with pytest.raises(KilledError):
        run(config)
    monkeypatch.undo()
    assert_same_outcome(run(config, resume=True), whole, config.output, tmp_path / "whole")


def test_finished_run_resumes_to_its_results(config):
    first = run(config, epochs=1)
    assert run(config, epochs=1, resume=True) == first


def test_termination_of_the_command_and_resume_by_output_alone(config, tmp_path):
    args = [sys.executable, "-m", "ema_timm", *cli(config, "--epochs", 200)]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:  # wait for training to be under way
        seen.append(line)
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "".join(seen) + rest
    assert f"--resume --output {config.output}" in rest
    saved = RunState(config.output).load()
    assert saved["epoch"] >= 2
    assert saved["config"]["epochs"] == 200


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_loader_processes_too_is_one_message(config, signum):
    """A terminal and torchrun signal the whole group; the loaders serve until the step is done."""
    args = [sys.executable, "-m", "ema_timm", *cli(config, "--epochs", 200, "--workers", 2)]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if line.startswith("epoch 1/"):
            os.killpg(process.pid, signum)
            if signum == signal.SIGTERM:  # schedulers repeat it
                os.killpg(process.pid, signum)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, rest
    assert rest.count("stopping after this step") == (signum == signal.SIGINT), rest
    assert "Traceback" not in rest, rest
    assert RunState(config.output).load()["epoch"] >= 1


def test_resume_needs_only_the_output(config, capsys):
    whole = run(config, epochs=1)
    assert main(["finetune", "--resume", "--output", config.output]) == 0
    assert f"top-1 {whole['metrics']['top1']:.2f}% of 23 images" in capsys.readouterr().out


def test_the_same_command_starts_continues_and_does_nothing(config, monkeypatch, tmp_path, capsys):
    whole = run(config, output=str(tmp_path / "whole"))
    same = cli(config, "--resume")
    monkeypatch.setattr(TrainStep, "__call__", interrupted_at(7))
    assert main(same) == 130
    monkeypatch.undo()
    assert main([*same, "--lr", "1"]) == 2
    assert "--lr is 1.0, but the run was started with" in capsys.readouterr().err
    assert main(same) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert_same_outcome(results, whole, config.output, tmp_path / "whole")
    before = RunState(config.output).file.stat().st_mtime_ns
    assert main(same) == 0
    assert RunState(config.output).file.stat().st_mtime_ns == before


def test_a_full_command_continues_only_a_run_of_its_settings(config, capsys):
    """A setting that it leaves out is the default, as at a start."""
    run(config, epochs=1, smoothing=0.2)
    assert_refused(cli(config, "--resume", "--epochs", 1), "--smoothing is 0.1, but", capsys)
    assert main(["finetune", "--resume", "--output", config.output]) == 0


def interrupted_at(batch):
    """A `TrainStep.__call__` that gets Ctrl-C at the batch of this number."""
    step, count = TrainStep.__call__, itertools.count(1)

    def interrupted(self, *args):
        if next(count) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    return interrupted


def test_a_resumed_epoch_reads_no_image_twice(config, monkeypatch):
    monkeypatch.setattr(TrainStep, "__call__", interrupted_at(4))
    with pytest.raises(InterruptedRunError):
        run(config, epochs=1)
    monkeypatch.undo()
    read, get = [], RepeatableImages.__getitem__
    monkeypatch.setattr(RepeatableImages, "__getitem__", lambda s, i: read.append(i) or get(s, i))
    run(config, epochs=1, resume=True)
    assert len(set(read)) == len(read) == 12  # the last batch of five


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_stopped_in_its_evaluation_continues_there(
    config, monkeypatch, tmp_path, workers
):
    """An evaluation can take longer than a scheduler waits."""
    config = dataclasses.replace(config, workers=workers, average_weights=0.9)
    whole = run(config, output=str(tmp_path / "whole"))
    add, batches = Tally.add, []

    def stopped(self, *batch):
        batches.append(batch)
        if len(batches) == 3:  # the first of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, *batch)

    monkeypatch.setattr(Tally, "add", stopped)
    with pytest.raises(InterruptedRunError) as stop:
        run(config)
    assert stop.value.signum == signal.SIGTERM and len(batches) == 3
    trained = []
    step = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda *a: trained.append(1) or step(*a))
    continued = run(config, resume=True)
    assert len(trained) == 5  # one epoch
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")


def test_resume_reads_the_state_once(config, monkeypatch):
    run(config, epochs=1)
    file, read = RunState(config.output).file, []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda f, **how: read.append(f) or load(f, **how))
    assert main(["finetune", "--resume", "--output", config.output]) == 0
    assert read == [file]
    run(config, epochs=1, resume=True)
    assert read == [file, file]


def test_full_disk_leaves_whole_files(stage, config, tmp_path):
    """A file size limit cuts the weights short, as a full disk does."""
    done = stage[1].run(*cli(config), largest_file=300_000)
    assert done["code"] == 1, done["err"]
    last = done["err"].strip().splitlines()[-1]
    assert last.startswith("ema-timm: ") and "File too large" in last
    assert [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def drop(folder, pattern):
    for path in folder.glob(pattern):
        shutil.rmtree(path)


BAD_DATA = {
    "no folder": (lambda d: shutil.rmtree(d), "has no folder train/"),
    "no images": (lambda d: drop(d, "train/*"), "no images in class folders"),
    "one class": (lambda d: drop(d, "train/digit_[123]"), "has one class (digit_0)"),
    "unknown class": (lambda d: drop(d, "train/digit_3"), "not among those trained on"),
    "unreadable": (
        lambda d: next(d.glob("val/digit_1/*.png")).write_bytes(b"?"),
        "not an image. Repair or remove it",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_gets_one_line_and_exit_code_2(config, digits, tmp_path, capsys, case):
    damage, said = BAD_DATA[case]
    data = shutil.copytree(digits, tmp_path / "data")
    damage(data)
    assert_refused(cli(config, "--data-dir", data), said, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_breaks_off_is_named_while_training(config, digits, tmp_path, capsys, workers):
    data = shutil.copytree(digits, tmp_path / "data")
    bad = next(data.glob("train/digit_2/*.png"))
    bad.write_bytes(bad.read_bytes()[:-30])
    assert_refused(cli(config, "--data-dir", data, "--workers", workers), f"read {bad}", capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model", "resnet50_emma"], "no model of that name. Did you mean resnet50_ema"),
        (["--model", "some/where"], "cannot build some/where"),
        (["--model", "local-dir:nowhere"], "nowhere/config.json is missing"),
        (["--model-kwargs", "ema_stages=[9]"], "ema_stages must name stages"),
        (["--model-kwargs", "ema_gruops=8"], "ema_gruops"),
        (["--batch-size", "61"], "more than the 60 training images"),
        (["--epochs", "0"], "at least 1"),
        (["--mixup", "0.2", "--batch-size", "7"], "must be even"),
        (["--device", "cuda:99"], "--device cuda:99 is not usable here"),
        (["--weights", "gone.safetensors"], "there is no file gone.safetensors"),
        (["--lr", "1e30"], "the loss became"),
        (["--opt", "adamwx"], "adamwx"),
        (["--aa", "foo"], "cannot build the augmentation: Unknown AA policy foo"),
        (["--color-jitter", "-1"], "--color-jitter must be at least 0, got -1.0"),
        (["--sched", "cosinus"], "cosinus"),
        (["--model", "mobilenetv2_035_ema", "--pretrained"], "No pretrained weights exist"),
    ],
)
def test_bad_settings_get_one_line_and_exit_code_2(config, capsys, changes, said):
    assert_refused(cli(config, *changes), said, capsys)


def test_missing_options_are_named(capsys):
    assert_refused(["finetune", "--model", "x"], "finetune needs --data-dir, --output", capsys)
    assert_refused(["finetune", "--resume"], "finetune needs --output", capsys)


def assert_refused(args, said, capsys):
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("ema-timm: ")]
    assert len(lines) == 1 and said in lines[0], captured.err
    assert lines[0] == captured.err.splitlines()[-1]
    assert captured.out == ""


def test_resume_refuses_what_would_change_the_outcome(config, digits, tmp_path, capsys):
    resume = ["finetune", "--resume", "--output", config.output]
    assert_refused(resume, "holds no run. To start one, add --model", capsys)
    run(config, epochs=1)
    assert_refused([*resume, "--lr", "0.1"], "--lr is 0.1, but the run was started with", capsys)
    assert_refused(cli(config, "--epochs", "1"), "already holds a run", capsys)
    data = shutil.copytree(digits, tmp_path / "data")
    next(data.glob("train/*/*.png")).unlink()
    assert_refused(
        [*resume, "--data-dir", data], "the images have changed since the run was started", capsys
    )
    saved = RunState(config.output)
    content = saved.load()
    content["model"]["fc.weight"] = torch.zeros(7, 96)
    saved.save(content)
    assert_refused(
        resume, "cannot resume: the saved weights belong to another network (size", capsys
    )


def test_starts_from_a_weights_file_without_network(config, tmp_path):
    plain = timm.create_model("test_resnet")
    for block in (plain.layer1[0].bn2, plain.layer3[0].bn3):
        torch.nn.init.ones_(block.weight)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    results = run(
        config, weights=str(tmp_path / "plain.safetensors"), pretrained=True, lr=1e-12, epochs=1
    )
    assert results["base"]["weights"] == "plain.safetensors"
    trained = load_file(tmp_path / "run" / "model.safetensors")
    expected = plain.layer1[0].bn2.weight * 2  # the warm start, hardly moved
    torch.testing.assert_close(trained["layer1.0.bn2.weight"], expected, rtol=1e-4, atol=1e-6)


def test_a_run_does_not_say_where_its_weights_were_cached(config, tmp_path):
    run(config, model_kwargs={"cache_dir": str(tmp_path / "cache"), "ema_groups": 8}, epochs=1)
    for name in ("config.json", "results.json"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()
    assert timm.create_model(f"local-dir:{config.output}", pretrained=True)


def test_continues_from_a_checkpoint_folder_with_other_classes(config, digits, tmp_path):
    run(config, model_kwargs={"ema_stages": [3, 4], "in_chans": 1}, epochs=1)
    data = shutil.copytree(digits, tmp_path / "data")
    drop(data, "*/digit_3")
    second = str(tmp_path / "second")
    results = run(
        config,
        model=f"local-dir:{config.output}",
        pretrained=True,
        data_dir=str(data),
        output=second,
        model_kwargs={"in_chans": 1},
        epochs=1,
    )
    assert len(results["classes"]) == 3
    model = timm.create_model(f"local-dir:{second}", pretrained=True)
    assert model.layer1[0].se is None and model.layer3[0].se is not None
    assert model.conv1[0].in_channels == 1
    first = load_file(tmp_path / "run" / "model.safetensors")
    assert results["base"] == {
        "model": "local-dir:run",  # not where it was on this machine
        "weights": "run",
        "hub_repository": None,
        "license": None,
        "sha256": sha256(tmp_path / "run" / "model.safetensors"),
    }
    assert first["fc.weight"].shape[0] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": True, "channels_last": True},
        {"model": "mobilenetv2_035_ema", "img_size": 64, "layer_decay": 0.8, "opt": "sgd"},
        {"model": "test_efficientnet", "cutmix": 0.5, "smoothing": 0.0, "clip_grad": 1.0},
        {"model": "cifar_resnet18_ema", "img_size": 0, "aa": "rand-m5", "grad_checkpointing": True},
        {"sched": "step", "smoothing": 0.0, "warmup_epochs": 0},
    ],
    ids=lambda c: c.get("model", "-".join(c)),
)
def test_settings_train(config, changes):
    results = run(config, epochs=1, **changes)
    assert results["metrics"]["images"] == 23
    # timm before 1.0.26 cannot read safetensors from a folder; for our names we see to it.
    readable = results["architecture"].endswith("_ema") or TIMM_VERSION >= (1, 0, 26)
    model = timm.create_model(f"local-dir:{config.output}", pretrained=readable)
    size = resolve_data_config(model=model)["input_size"]
    assert tuple(results["input"]["input_size"]) == tuple(size)


def torchrun(*args, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "ema_timm", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        **options,
    )


@pytest.mark.slow
def test_two_processes_count_every_image_once_and_resume(config, digits, tmp_path):
    done = torchrun(*cli(config, "--epochs", 2, "--batch-size", 6))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["processes"] == 2
    assert results["metrics"]["images"] == 23  # odd: one shard is padded, and not counted so
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert validate(model, digits)["correct"] == results["metrics"]["correct"]
    assert done.stderr.count("epoch 2/2") == 1  # one process speaks
    assert done.stdout.count("top-1") == 1
    again = torchrun("finetune", "--resume", "--output", config.output)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("from epoch 3") == 1


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A process for commands, where no Hub answers."""
    home = str(tmp_path_factory.mktemp("hf"))
    worker = Worker({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": home, "NO_PROXY": "*"})
    yield worker
    worker.close()


@pytest.mark.parametrize("model", ["hf-hub:ada/none", "test_resnet", "test_vit.r160_in1k"])
def test_without_network_nothing_is_waited_for_in_vain(offline, config, model):
    """The client alone sleeps 23 s between its calls before it gives up, and says nothing."""
    done = offline.run(*cli(config, "--model", model, "--pretrained"))
    assert done["code"] == 1, done["err"]
    assert "Check the network" in done["err"].splitlines()[-1]
    assert done["slept"] <= 3
