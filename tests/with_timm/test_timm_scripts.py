"""timm's own scripts, unmodified, from a clone of timm at TIMM_REPO."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

REPO = os.environ.get("TIMM_REPO")
pytestmark = pytest.mark.skipif(not REPO, reason="set TIMM_REPO to a clone of timm to run this")


@pytest.fixture
def script(tmp_path):
    """Run one of timm's scripts from a copy: a timm/ folder beside it shadows the installed one."""

    def run(name, *args):
        shutil.copy(Path(REPO) / name, tmp_path)
        command = [sys.executable, name, *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


ANY = ["--model-kwargs", "base=test_convnext2", "at=stages", "groups=4", "--layer-decay", "0.8"]


@pytest.mark.parametrize(
    ("model", "options", "layer"),
    [
        ("test_resnet_ema", [], "layer1.0.se"),
        ("ema_any", ANY, "stages.0.blocks.0.ema"),
    ],
)
def test_train_then_validate(script, digits, tmp_path, model, options, layer):
    common = ["--data-dir", digits, "--model", model, "--num-classes", 4]
    common += ["--device", "cpu", "--img-size", 32, "-b", 12, "-j", 0, *options[:4]]
    more = ["--epochs", 2, "--lr", 0.01, "--output", "out", "--experiment", "a", *options[4:]]
    script("train.py", *common, *more)
    best = tmp_path / "out" / "a" / "model_best.pth.tar"
    out = script("validate.py", *common, "--split", "val", "--checkpoint", best)
    result = json.loads(out.partition("--result")[2])
    assert result["model"] == model
    assert 0 <= result["top1"] <= 100
    state = torch.load(best, weights_only=False)["state_dict"]
    assert f"{layer}.conv1x1.weight" in state


def test_validate_counts_as_finetune_does(script, digits, tmp_path):
    from ema_timm.training.run import finetune
    from ema_timm.training.settings import FinetuneConfig

    results = finetune(
        FinetuneConfig(
            model="test_resnet_ema",
            data_dir=str(digits),
            output=str(tmp_path / "run"),
            img_size=32,
            epochs=3,
            batch_size=12,
            lr=4e-3,
            hflip=0.0,
            device="cpu",
            workers=0,
            pretrained=False,
        ),
        progress=False,
    )
    args = ["--data-dir", digits, "--split", "val", "--device", "cpu", "-j", 0]
    out = script("validate.py", *args, "--model", "local-dir:run", "--pretrained")
    top1 = json.loads(out.partition("--result")[2])["top1"]
    assert top1 == pytest.approx(results["metrics"]["top1"], abs=1e-3)


@pytest.mark.parametrize("averaged", [False, True])
def test_evaluate_counts_as_validate_does(script, digits, tmp_path, averaged):
    """On a checkpoint of train.py, its weights and the averaged ones, to the last image."""
    from ema_timm.measure.evaluation import evaluate
    from ema_timm.measure.settings import EvaluateConfig

    common = ["--data-dir", digits, "--model", "test_resnet_ema", "--num-classes", 4]
    common += ["--device", "cpu", "--img-size", 32, "-b", 12, "-j", 0]
    more = ["--epochs", 6, "--lr", 0.05, "--model-ema", "--model-ema-decay", 0.5]
    script("train.py", *common, *more, "--output", "out", "--experiment", "a")
    best = tmp_path / "out" / "a" / "model_best.pth.tar"
    flags = ["--use-ema"] if averaged else []
    out = script("validate.py", *common, "--split", "val", "--checkpoint", best, *flags)
    theirs = json.loads(out.partition("--result")[2])
    config = EvaluateConfig(
        str(best),
        data_dir=str(digits),
        output=str(tmp_path / "folder"),
        use_averaged=averaged,
        device="cpu",
        workers=0,
    )
    ours = evaluate(config, progress=False)
    assert ours["metrics"]["top1"] == pytest.approx(theirs["top1"], abs=1e-3)
    assert theirs["img_size"] == ours["input"]["input_size"][1] == 32
    assert theirs["crop_pct"] == ours["input"]["crop_pct"]
    # The folder that was written, by timm's script again.
    args = ["--data-dir", digits, "--split", "val", "--device", "cpu", "-j", 0]
    out = script("validate.py", *args, "--model", "local-dir:folder", "--pretrained")
    again = json.loads(out.partition("--result")[2])
    assert again["top1"] == theirs["top1"]


MODEL = "resnet18_ema"
DATA = ["--num-classes", 4, "--img-size", 32, "--device", "cpu", "-j", 0]


def train_args(digits, *args, model=MODEL):
    common = ["--data-dir", digits, "--model", model, *DATA, "-b", 12, "--lr", 0.01]
    return [*common, "--output", "out", "--experiment", "a", *args]


def read(file):
    return torch.load(file, weights_only=False)


def top1(out):
    return json.loads(out.partition("--result")[2])["top1"]


@pytest.fixture
def warm(tmp_path):
    """A file of plain weights, as somebody without network would have it."""
    file = tmp_path / "plain.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), file)
    return file


def test_one_run_with_many_options_resumed_and_its_checkpoints(script, digits, warm, tmp_path):
    """Warm start, averaged weights, bfloat16, channels last, checkpointing, layer decay, resume."""
    options = ["--pretrained", "--pretrained-path", warm, "--model-ema", "--channels-last"]
    options += ["--amp", "--amp-dtype", "bfloat16", "--grad-checkpointing", "--layer-decay", 0.75]
    options += ["--head-init-scale", 0.1, "--head-init-bias", -1.0, "--opt", "adamw"]
    args = train_args(digits, *options, "--sched", "step", "--warmup-epochs", 0)
    script("train.py", *args, "--epochs", 1)
    out = tmp_path / "out" / "a"
    first = read(out / "last.pth.tar")
    plain = load_file(warm)["layer2.0.conv1.weight"]
    moved = (first["state_dict"]["layer2.0.conv1.weight"] - plain).abs().max()
    assert 0 < moved < 0.5 * plain.abs().max()  # started from the file, and trained
    assert first["state_dict_ema"]["layer2.0.se.gn.weight"].abs().max() < 1e-2  # near the start
    script("train.py", *args, "--epochs", 2, "--resume", out / "last.pth.tar")
    last = read(out / "last.pth.tar")
    assert (first["epoch"], last["epoch"]) == (0, 1)
    epochs = [line.split(",")[0] for line in (out / "summary.csv").read_text().splitlines()]
    assert [epoch for epoch in epochs if epoch != "epoch"] == ["0", "1"]

    val = ["--data-dir", digits, "--split", "val", *DATA]
    from_file = ["--model", MODEL, "--checkpoint", out / "last.pth.tar"]
    expected = top1(script("validate.py", *val, *from_file))
    same = top1(script("validate.py", *val, *from_file, "--reparam", "--channels-last"))
    assert same == pytest.approx(expected, abs=100 / 23 + 1e-3)  # an image on the edge may turn

    script("clean_checkpoint.py", "--checkpoint", out / "last.pth.tar", "--output", "c.pth")
    clean = next(tmp_path.glob("c-*.pth"))
    cleaned = top1(script("validate.py", *val, "--model", MODEL, "--checkpoint", clean))
    averaged = top1(script("validate.py", *val, *from_file, "--use-ema"))
    assert cleaned == averaged  # clean_checkpoint takes the averaged weights

    files = ["--filter", "checkpoint-*.pth.tar", "--output", "mean.pth", "--no-use-ema"]
    script("avg_checkpoints.py", "--input", "out/a", *files)
    mean = read(tmp_path / "mean.pth")
    runs = [read(file)["state_dict"] for file in sorted(out.glob("checkpoint-*.pth.tar"))]
    assert len(runs) == 2
    key = "layer1.0.se.conv3x3.weight"
    torch.testing.assert_close(mean[key], (runs[0][key] + runs[1][key]) / 2)


@pytest.mark.parametrize("options", [[], ["--torchscript"]], ids=str)
def test_inference(script, digits, tmp_path, options):
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    torch.save(timm.create_model(MODEL, num_classes=4).state_dict(), tmp_path / "net.pth")
    args = ["--data-dir", digits / "val", *DATA, "--model", MODEL, "--checkpoint", "net.pth"]
    script("inference.py", *args, "--results-dir", tmp_path, "--topk", 1, *options)
    (table,) = tmp_path.glob(f"{MODEL}-*.csv")
    assert len(table.read_text().splitlines()) == 24  # a header and 23 images


@pytest.mark.parametrize("option", ["--torchscript", "--torchcompile"])
def test_scripted_and_compiled(script, digits, tmp_path, option):
    model = "test_resnet_ema"
    script("train.py", *train_args(digits, option, "--epochs", 1, model=model))
    val = ["--data-dir", digits, "--split", "val", *DATA, "--model", model]
    val += ["--checkpoint", tmp_path / "out" / "a" / "last.pth.tar"]
    assert top1(script("validate.py", *val, option)) == top1(script("validate.py", *val))


def test_benchmark(script, tmp_path):
    args = ["--model", MODEL, "--device", "cpu", "--img-size", 32, "-b", 2]
    args += ["--num-warm-iter", 1, "--num-bench-iter", 5, "--results-file", "bench.json"]
    script("benchmark.py", *args, "--results-format", "json", "--bench", "both")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["infer_samples_per_sec"] > 0
    assert result["train_samples_per_sec"] > 0
    assert result["param_count"] == 11.7


def test_predict_says_what_inference_says(script, trained, digits, tmp_path):
    """Files, classes, labels and probabilities, image by image."""
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    from ema_timm.see.classify import predict
    from ema_timm.see.settings import PredictConfig

    shutil.copytree(trained, tmp_path / "run")
    args = ["--data-dir", digits / "val", "--model", "local-dir:run", "--pretrained", "-j", 0]
    args += ["--device", "cpu", "--topk", 3, "--results-separate-col", "--include-index"]
    args += ["--fullname", "--label-type", "name", "--results-file", "theirs.csv"]
    script("inference.py", *args, "--no-console-results")
    options = {"topk": 3, "output": str(tmp_path / "ours.csv"), "workers": 0, "device": "cpu"}
    predict(PredictConfig(str(trained), [str(digits / "val")], **options))
    tables = [
        list(csv.DictReader((tmp_path / f"{whose}.csv").read_text("utf-8").splitlines()))
        for whose in ("theirs", "ours")
    ]
    for theirs, ours in zip(*tables, strict=True):
        assert list(theirs) == list(ours)
        assert ours["filename"] == str(digits / "val" / theirs["filename"])
        for name in set(theirs) - {"filename"}:
            if name.startswith("prob"):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-6)
            else:
                assert ours[name] == theirs[name]


@pytest.mark.parametrize("options", [[], ["--reparam"], ["--dynamo"]], ids=str)
def test_onnx(script, digits, tmp_path, options):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    torch.save(timm.create_model(MODEL, num_classes=4).state_dict(), tmp_path / "net.pth")
    args = ["--model", MODEL, "--img-size", 32, "--num-classes", 4, "--dynamic-size"]
    args += ["--checkpoint", "net.pth"]  # without one this script downloads weights
    script("onnx_export.py", "net.onnx", *args, "--check-forward", *options)
    out = script("onnx_validate.py", digits / "val", "--onnx-input", "net.onnx", "--img-size", 64,
                 "-b", 23, "-j", 0)  # fmt: skip
    assert "Prec@1" in out


LAUNCHER = """
import hashlib, os, runpy, sys
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel

# train.py passes device_ids=[cpu], which PyTorch refuses for any network on a CPU.
wrapped, wrap = [], DistributedDataParallel.__init__
def on_cpu(self, module, device_ids=None, **kwargs):
    wrap(self, module, **kwargs)
    wrapped.append(module)
DistributedDataParallel.__init__ = on_cpu
rank = os.environ["RANK"]
Path(f"pid{rank}").write_text(str(os.getpid()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
(module,) = wrapped
digest = hashlib.sha256()
for parameter in module.parameters():
    digest.update(parameter.detach().numpy().tobytes())
Path(f"digest{rank}").write_text(digest.hexdigest())
"""


def test_two_processes_one_killed_and_resumed(digits, tmp_path):
    shutil.copy(Path(REPO) / "train.py", tmp_path)
    (tmp_path / "launch.py").write_text(LAUNCHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = train_args(digits, "--epochs", 30, "--sched", "step", model="test_resnet_ema")
    command = [*launch, "launch.py", "train.py", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = tmp_path / "out" / "a" / "last.pth.tar"
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        until = time.monotonic() + 200
        while not last.is_file() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert last.is_file(), (tmp_path / "log").read_text()
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        assert run.wait(timeout=200) != 0
    assert not list(tmp_path.glob("digest*"))
    shutil.copy(last, tmp_path / "kept.pth.tar")
    start = read(last)["epoch"]
    resumed = [*command, "--resume", "kept.pth.tar", "--epochs", str(start + 2)]
    done = subprocess.run(
        resumed, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert read(last)["epoch"] == start + 1
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()
