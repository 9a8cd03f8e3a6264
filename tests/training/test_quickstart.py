"""The README's first command, as a newcomer runs it."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quickstart_learns_the_digits_and_reloads_the_same_model(tmp_path):
    command = [sys.executable, "-m", "ema_timm", "quickstart", "--output", "out"]
    offline = {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=_env(offline)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/run/results.json").read_text())
    metrics = results["metrics"]
    assert metrics["images"] == 360
    assert metrics["top1"] >= 97
    assert f"({metrics['correct']} of 360 held-out digits)" in done.stdout
    assert "exactly the same accuracy" in done.stdout
    assert "ema-timm finetune --model resnet50_ema" in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists. Remove out" in again.stderr


def _env(more):
    import os

    return {**os.environ, **more}


def test_a_reloaded_model_that_differs_is_an_error(tmp_path, monkeypatch):
    from ema_timm.training import quickstart

    fake = {"metrics": {"correct": 359, "images": 360, "top1": 99.7}}
    monkeypatch.setattr(quickstart, "finetune", lambda *a, **k: fake)
    monkeypatch.setattr(
        quickstart, "_validate_elsewhere", lambda *a: {"correct": 358, "images": 360}
    )
    with pytest.raises(RuntimeError, match="358"):
        quickstart.quickstart(tmp_path / "out", progress=False)


def test_a_stopped_quick_start_ends_as_a_stopped_run_does(monkeypatch, tmp_path, capsys):
    from ema_timm.cli import main
    from ema_timm.errors import InterruptedRunError
    from ema_timm.training import quickstart

    def stopped(*args, **kwargs):
        raise InterruptedRunError("stopped; continue with: X")

    monkeypatch.setattr(quickstart, "finetune", stopped)
    assert main(["quickstart", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "ema-timm: stopped; continue with: X\n"
