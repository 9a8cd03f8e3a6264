"""Several processes and one file: killed, at once, and joined as those of one training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import candidates as stand_ins
from support.candidates import LAYER, Candidate, StandInClock

from ema_timm.ops.gpu.choice_file import file_of, read_file
from ema_timm.tuning.decide import decide

TESTS = Path(__file__).resolve().parents[1]
BEGIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(TESTS)!r})
import torch
from pathlib import Path
from support import candidates as stand_ins
from support.candidates import LAYER, Candidate, StandInClock
from ema_timm.tuning.decide import decide
clock = StandInClock()

def run(act, layers):
    swift = Candidate(clock, 1.0, act=act)
    names = {{"closed_form": Candidate(clock, 10.0), "swift": swift}}
    return decide(dict.fromkeys(layers, torch.float32), names, stand_ins.store(), clock)
"""


@pytest.fixture
def start():
    """``start(code, *args)``: a process, killed in the end if it still runs."""
    processes = []

    def begin(code, *args):
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + code, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=os.sep,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def noted():
    return read_file(file_of(stand_ins.ENVIRONMENT), stand_ins.ENVIRONMENT)


def test_what_a_process_was_trying_when_it_was_killed_is_not_tried_again(start, caplog):
    killed = start("run(lambda: os.kill(os.getpid(), signal.SIGKILL), [LAYER])")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert noted().layers[LAYER]["swift"]["state"] == "trying"

    clock = StandInClock()
    swift = Candidate(clock, 1.0)
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": swift}
    for other in (LAYER, LAYER._replace(batch=2)):  # at no layer
        (outcome,) = decide({other: torch.float32}, candidates, stand_ins.store(), clock)
        assert outcome.chosen == "closed_form"
        assert "a process ended" in outcome.candidates["swift"]["reason"]
    assert swift.calls == 0
    assert len(caplog.records) == 2  # one line each time
    assert all("\n" not in r.message and "--retry" in r.message for r in caplog.records)

    (outcome,) = decide({LAYER: torch.float32}, candidates, stand_ins.store(), clock, retry=True)
    assert outcome.chosen == "swift"
    assert noted().disabled == {}


def test_of_two_at_once_one_waits_and_nothing_is_lost(start, tmp_path):
    """The first is inside its candidate until the second has said that it waits."""
    first = start(
        "ready, go = map(Path, sys.argv[1:])\n"
        "def act():\n"
        "    ready.touch()\n"
        "    while not go.exists(): time.sleep(0.01)\n"
        "run(act, [LAYER])",
        *(tmp_path / "ready", tmp_path / "go"),
    )
    while not (tmp_path / "ready").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    second = start("run(lambda: None, [LAYER._replace(batch=2), LAYER])")
    assert "waiting" in second.stderr.readline()
    (tmp_path / "go").touch()
    for process in (first, second):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert noted().chosen == {LAYER: "swift", LAYER._replace(batch=2): "swift"}
    assert noted().disabled == {}  # a mark of one that lives is not taken for one of the dead


JOINED = """
from torch import distributed
from ema_timm.errors import VerificationError
from ema_timm.tuning.collective import by_first_rank
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def refuse():
    raise AssertionError("only the first process tries")

(outcome,) = by_first_rank(
    lambda: run((lambda: None) if rank == 0 else refuse, [LAYER]), torch.device("cpu")
)
print(outcome.chosen, outcome.layer == LAYER)

def fail():
    raise RuntimeError("out of luck.")

try:
    by_first_rank(fail, torch.device("cpu"))
except (RuntimeError, VerificationError) as error:
    print(type(error).__name__, error)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_one_training_take_what_the_first_one_chose(start, tmp_path):
    ranks = [start(JOINED, rank, tmp_path / "store") for rank in (0, 1)]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0][0].splitlines() == ["swift True", "RuntimeError out of luck."]
    one, failed = said[1][0].splitlines()
    assert one == "swift True"
    assert failed.startswith("VerificationError") and failed.endswith("RuntimeError: out of luck.")
