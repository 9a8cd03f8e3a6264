"""Killed at random moments, again and again, a run comes to what it would have come to."""

import json
import random
import signal
import subprocess
import time

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.runs import cli, command, ema_timm, timeless

from ema_timm.training.resume import RunState

KILLS = 10


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_comes_to_the_same(config, tmp_path):
    start = cli(config, "--epochs", 6, "--workers", 1)
    began = time.monotonic()
    assert ema_timm(*start, "--output", tmp_path / "whole").returncode == 0
    duration = time.monotonic() - began
    rng, killed, runs = random.Random(0), 0, 0
    while killed < KILLS:  # a run that ends before is compared, and another one killed
        runs += 1
        folder = tmp_path / f"run{runs}"
        same = [*start, "--resume", "--output", folder]
        while killed < KILLS:
            code = killed_after(rng.uniform(0.2, 0.9) * duration, *same)
            assert_whole(folder)
            if code == 0:
                break
            killed += 1
        done = ema_timm(*same)
        assert done.returncode == 0, done.stderr
        assert_same_checkpoint(folder, tmp_path / "whole")


def killed_after(seconds, *args):
    """The exit code of ``ema-timm ARGS``, which is killed if it takes longer."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(*args), text=True, **pipes)
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


def assert_same_checkpoint(folder, other):
    done, whole = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    assert timeless(done) == timeless(whole)
    assert done["weights_sha256"] == whole["weights_sha256"]
    state = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    for name, tensor in load_file(other / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name


def assert_whole(folder):
    """Every file that a kill left under its own name is all there."""
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    if (folder / "model.safetensors").exists():
        load_file(folder / "model.safetensors")
    saved = RunState(folder)
    if saved.file.exists():
        assert saved.load()["identity"] and not saved.warning
