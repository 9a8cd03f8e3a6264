"""timm's own scripts, unmodified, from a clone of timm at TIMM_REPO."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_train_then_validate(script, digits, tmp_path):
    common = ["--data-dir", digits, "--model", "test_resnet_ema", "--num-classes", 4]
    common += ["--device", "cpu", "--img-size", 32, "-b", 12, "-j", 0]
    script("train.py", *common, "--epochs", 2, "--lr", 0.01, "--output", "out", "--experiment", "a")
    best = tmp_path / "out" / "a" / "model_best.pth.tar"
    out = script("validate.py", *common, "--split", "val", "--checkpoint", best)
    result = json.loads(out.partition("--result")[2])
    assert result["model"] == "test_resnet_ema"
    assert 0 <= result["top1"] <= 100
    state = torch.load(best, weights_only=False)["state_dict"]
    assert "layer1.0.se.conv1x1.weight" in state


def test_validate_counts_as_finetune_does(script, digits, tmp_path):
    from ema_timm.finetune import finetune
    from ema_timm.finetune_config import FinetuneConfig

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
    from ema_timm.evaluate import evaluate
    from ema_timm.evaluate_config import EvaluateConfig

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
