"""Shared fixtures: fresh interpreters, a small image folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ema_timm.integrations.int8 import disable_telemetry

# Where no GPU is at hand, Triton's interpreter runs the fused kernels on the CPU. Triton looks at
# this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
disable_telemetry()

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def python():
    """Run code in a fresh interpreter; returns its stdout, fails with its stderr."""

    def run(code, *flags, env=None, cwd=None, args=(), check=True):
        done = subprocess.run(
            [sys.executable, *flags, "-c", code, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd or os.sep,  # not the checkout: what is tested is the installed package
            env={**os.environ, **(env or {})},
            timeout=300,
        )
        if check and done.returncode:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done if not check else done.stdout

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """An image folder of real handwritten digits: 4 classes, 60 to train on, 23 to validate."""
    from sklearn.datasets import load_digits

    from ema_timm.training.quickstart import write_image

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    taken = {"train": 0, "val": 0}
    for index, (image, target) in enumerate(zip(data.images, data.target, strict=True)):
        split = "val" if index % 4 == 0 else "train"
        if target < 4 and taken[split] < {"train": 60, "val": 23}[split]:
            taken[split] += 1
            write_image(image, folder / split / f"digit_{target}" / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A folder that `ema-timm finetune` wrote: the smallest EMA network, a little trained."""
    from ema_timm.training.run import finetune
    from ema_timm.training.settings import FinetuneConfig

    folder = tmp_path_factory.mktemp("trained") / "run"
    config = FinetuneConfig(
        model="test_resnet_ema",
        data_dir=str(digits),
        output=str(folder),
        pretrained=False,
        img_size=32,
        epochs=8,
        batch_size=12,
        lr=4e-3,
        hflip=0.0,
        device="cpu",
        workers=0,
    )
    finetune(config, progress=False)
    return folder


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A folder of the smallest detector with EMA attention, measured; skips without ultralytics."""
    from support.detector import write_detector

    return write_detector(tmp_path_factory.mktemp("detector"))


class Worker:
    """A process for `ema-timm` commands; see support/hub_worker.py."""

    def __init__(self, env):
        script = Path(__file__).parent / "support" / "hub_worker.py"
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def run(self, *args, **settings):
        """Exit code, both streams and the seconds of ``ema-timm ARGS``."""
        return self._do({"args": [str(arg) for arg in args], **settings})

    def load(self, name, **settings):
        """``{"outputs": ...}`` of a timm name, or ``{"error": ...}``."""
        return self._do({"name": name, **settings})

    def _do(self, task):
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def hub_env(tmp_path_factory):
    """Environment variables with which a fresh process talks to a stand-in Hub."""
    from support.stand_in_hub import ADA

    def env(hub, token=ADA):
        return {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf")),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }

    return env


@pytest.fixture(scope="session")
def stage(hub_env):
    """A stand-in for the Hub and a worker that talks to it; each test takes names of its own."""
    from support.stand_in_hub import StandInHub

    with StandInHub() as hub:
        impatient = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        worker = Worker({**hub_env(hub), **impatient, "HF_HUB_DISABLE_XET": "1"})
        yield hub, worker
        worker.close()
        assert not hub.leaks  # the token has gone to the Hub alone, not to where large files are


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What tests look at is not noted in the user's own cache."""
    os.environ["EMA_TIMM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
