"""Shared fixtures: fresh interpreters, a small image folder, a check for leftover processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Tests that run side by side share the cores: threads that wait for each other's turn cost twice
# the time. PyTorch looks at this when it is first imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    share = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import torch

from ema_timm.integrations.int8 import disable_telemetry

# Where no GPU is at hand, Triton's interpreter runs the fused kernels on the CPU. Triton looks at
# this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
disable_telemetry()

# OpenVINO and NNCF send telemetry if they can import this package. It calls the internet from
# processes that it forks off a thread, and such a fork of the tests can deadlock.
sys.modules["openvino_telemetry"] = None

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
    from support.worker import Worker

    with StandInHub() as hub:
        impatient = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        worker = Worker({**hub_env(hub), **impatient, "HF_HUB_DISABLE_XET": "1"})
        yield hub, worker
        worker.close()
        assert not hub.leaks  # the token has gone to the Hub alone, not to where large files are


STARTED_BY = "PYTEST_STARTED_BY"  # an environment variable of whatever the tests start
ENDS_BY_ITSELF = "multiprocessing.resource_tracker"  # with the process that it serves


@pytest.fixture(autouse=True, scope="session")
def _no_process_is_left():
    """Fail at the end of the session, in each of xdist's workers, if a process is left."""
    os.environ[STARTED_BY] = str(os.getpid())
    yield
    until = time.monotonic() + 10  # for those that are about to end
    while (left := started_processes()) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, f"the tests left processes behind: {left}"


def started_processes():
    """Command lines by process id, of children and of what children started; Linux only."""
    mark, found = f"{STARTED_BY}={os.getpid()}\0".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (
                (folder / name).read_text(errors="replace") for name in ("stat", "cmdline")
            )
            state, parent = status.rpartition(")")[2].split()[:2]
            started = int(parent) == os.getpid() or mark in (folder / "environ").read_bytes()
            command = command.replace("\0", " ").strip()
        except OSError:  # it has ended, or is another user's
            continue
        if started and state != "Z" and ENDS_BY_ITSELF not in command:
            found[int(folder.name)] = command
    return found


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What tests look at is not noted in the user's own cache."""
    os.environ["EMA_TIMM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
