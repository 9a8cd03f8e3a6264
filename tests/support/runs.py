"""Fine-tuning runs as tests start them: from Python, and as a command."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

import torch

from ema_timm.training.resume import RunState
from ema_timm.training.run import finetune
from ema_timm.training.step import TrainStep


def run(config, **changes):
    resume = changes.pop("resume", False)
    return finetune(dataclasses.replace(config, **changes), resume=resume, progress=False)


def interrupt(monkeypatch, at):
    """From now on a run gets Ctrl-C at the batch of this number; returns the batches it trains."""
    step, batches = TrainStep.__call__, []

    def interrupted(self, images, targets, done):
        batches.append(done)
        if len(batches) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, images, targets, done)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    return batches


def cli(config, *more):
    """Arguments of the command line that say what ``config`` says."""
    args = ["finetune"]
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default or value in ({}, []):
            continue
        if isinstance(value, bool):
            args.append(f"--{name}" if value else f"--no-{name}")
        else:
            args += [f"--{name}", str(value)]
    return [*args, *map(str, more)]


def command(*args):
    """``ema-timm ARGS`` as a process would be told."""
    return [sys.executable, "-m", "ema_timm", *map(str, args)]


def ema_timm(*args, **env):
    """``ema-timm ARGS`` in a process of its own, done."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )


@contextlib.contextmanager
def under_way(config, *more):
    """A run in a process of its own that has told of its first epoch; killed in the end."""
    process = subprocess.Popen(command(*cli(config, *more)), stderr=subprocess.PIPE, text=True)
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("epoch 1/"):
                break
        else:
            raise RuntimeError("".join(seen))
        yield process
    finally:
        process.kill()
        process.communicate()


def timeless(results):
    """The history without what differs each time."""
    measured = {"seconds", "images_per_second", "peak_memory_mib"}
    return [{k: v for k, v in e.items() if k not in measured} for e in results["history"]]


def assert_same_outcome(one, other, *outputs):
    """Two runs have measured and learned the same, to the last bit."""
    assert timeless(one) == timeless(other)
    assert one["weights_sha256"] == other["weights_sha256"]
    states = [RunState(output).load()["model"] for output in outputs]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
