"""The example for Ray, on a cluster of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "compare_on_ray.py"


def training(folder):
    """Ids of processes that train into ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"finetune" in command and os.fsencode(folder) in command:
            found.append(int(process.name))
    return found


@pytest.mark.long
def test_a_comparison_on_ray_survives_a_killed_worker(digits, tmp_path):
    output = tmp_path / "compare"
    args = ["--model", "resnet18", "--attention", "none", "ema", "--seeds", "1", "--epochs", "2"]
    args += ["--data-dir", digits, "--img-size", "32", "--batch-size", "12", "--workers", "0"]
    command = [sys.executable, SCRIPT, output, *args, "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    local = "import ray, sys, runpy\nstart = ray.init\n"
    local += "ray.init = lambda: start(num_cpus=1, _node_ip_address='127.0.0.1', "
    local += "include_dashboard=False)\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])\n"
    command = [sys.executable, "-c", local, *map(str, command[1:])]
    run = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 200
    while not list(output.glob("*/training/state.pt")):
        assert run.poll() is None and time.monotonic() < until, run.communicate()[1]
        time.sleep(0.1)
    (first,) = (state.parent.parent for state in output.glob("*/training/state.pt"))
    for process in training(first):
        os.kill(process, signal.SIGKILL)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    rows = json.loads((output / "compare.json").read_text())["rows"]
    assert len(rows) == 2 and not any(row["why_not"] for row in rows), rows
