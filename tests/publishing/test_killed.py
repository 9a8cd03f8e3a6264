"""Commands killed at random moments: what they leave is whole, and the next call carries on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ema_timm.checkpoints.cards.file import write_card
from ema_timm.checkpoints.check import check_publishable
from ema_timm.checkpoints.network import check_network

pytestmark = pytest.mark.long

KILLS = 10
# Importing takes most of a command's time and writes nothing: the moments are counted from then on.
_CODE = """
import sys
import timm, sklearn, matplotlib.pyplot
import ema_timm.measure.evaluation, ema_timm.publishing.upload
from ema_timm.cli import main
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


def start(args, env=None):
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.sep,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        start_new_session=True,  # its own processes are killed with it
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def finish(args, env=None):
    """Exit code, messages and seconds of a call that nobody kills."""
    process, started = start(args, env), time.monotonic()
    _, err = process.communicate(timeout=600)
    return process.returncode, err, time.monotonic() - started


def kill(args, after, env=None):
    """Kill a call ``after`` seconds, where it has not ended by then."""
    process = start(args, env)
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def moments(seconds, seed):
    """Random moments of a command that takes so long; the end, where files are written, weighs."""
    chance = random.Random(seed)
    return [seconds * chance.random() ** 0.5 for _ in range(KILLS)]


def assert_whole(folder):
    """Every file that has its final name can be read to its end."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.startswith("."):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_carries_on(args, folder, digits):
    """The same call ends well, or names the call that does; then the folder can be published."""
    code, err, _ = finish(args)
    if code:
        assert code == 2 and "holds a checkpoint already. Measure it with" in err, err
        assert json.loads((folder / "results.json").read_text())["checkpoint"]["file"] == "w.pt"
        code, err, _ = finish(["evaluate", folder, "--data-dir", digits, "--workers", 0])
        assert code == 0, err
    check_network(folder)
    write_card(folder)
    return check_publishable(folder)


@pytest.mark.parametrize("command", ["card", "evaluate", "evaluate a file", "convert"])
def test_a_command_on_a_folder(command, trained, digits, tmp_path):
    weights = tmp_path / "w.pt"
    torch.save(load_file(trained / "model.safetensors"), weights)

    def prepare(name):
        """The folder of one call, and the call."""
        folder = tmp_path / name
        images = ["--data-dir", digits, "--device", "cpu", "--workers", 0]
        if command == "evaluate a file":
            of_file = ["--model", "test_resnet_ema", "--img-size", 32, "--output", folder]
            return folder, ["evaluate", weights, *of_file, *images]
        if command == "convert":
            return folder, ["convert", weights, "--model", "test_resnet_ema", "--output", folder]
        shutil.copytree(trained, folder)
        if command == "evaluate":
            return folder, ["evaluate", folder, *images]
        return folder, ["card", folder, "--license", "mit"]

    code, err, seconds = finish(prepare("whole")[1])
    assert code == 0, err
    for number, moment in enumerate(moments(seconds, command)):
        folder, args = prepare(f"killed-{number}")
        kill(args, moment)
        assert_whole(folder)
        checked = assert_carries_on(args, folder, digits)
        if command == "card":
            assert checked.results["card"]["license"] == "mit"


def test_publish(trained, stage, hub_env):
    hub = stage[0]
    hub.heal()
    # The command sets it before the client is imported, which is too late here.
    env = {**hub_env(hub), "HF_HUB_DISABLE_XET": "1"}
    before = contents(Path(trained))
    code, err, seconds = finish(["publish", trained, "--repo-id", "ada/not-killed"], env)
    assert code == 0, err
    whole = hub.files("ada/not-killed")
    for number, moment in enumerate(moments(seconds, "publish")):
        repo = f"ada/killed-{number}"
        args = ["publish", trained, "--repo-id", repo]
        kill(args, moment, env)
        assert contents(Path(trained)) == before
        assert set(hub.files(repo)) in (set(), {".gitattributes"}, set(whole))
        code, err, _ = finish(args, env)
        assert code == 0, err
        assert hub.files(repo) == whole
        assert len([t for t in hub.titles(repo) if t.startswith("Publish")]) == 1
