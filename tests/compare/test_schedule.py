"""Runs side by side. What they compute does not matter here: small scripts stand for them."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from ema_timm.compare import schedule
from ema_timm.compare.runs import PlannedRun
from ema_timm.compare.variants import Variant
from ema_timm.errors import InterruptedRunError, UserError


class ScriptRun(PlannedRun):
    """A run whose process is a script. Each line that it writes to results.json is an epoch."""

    epochs = 2

    def arguments(self, device=None):
        return [self.settings["script"], str(device), str(self.folder / "results.json")]

    def history(self):
        file = self.folder / "results.json"
        return json.loads(file.read_text()) if file.is_file() else []


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of these scripts, called a, b, c, ..."""
    monkeypatch.setattr(
        schedule, "process_arguments", lambda words: [sys.executable, "-S", "-c", *words]
    )

    def make(*scripts):
        return [
            ScriptRun(
                Variant(name, "", {}),
                1,
                {"script": script, "output": tmp_path / name},
                None,
                tmp_path / "logs" / name,
            )
            for name, script in zip("abcdef", scripts, strict=False)
        ]

    for name in "abcdef":
        (tmp_path / name).mkdir()
    return make


def names(failed):
    return {name[0]: why for name, why in failed.items()}


def test_a_run_that_fails_says_why_and_the_others_go_on(runs, capsys):
    finished = []
    failed = schedule.run_all(
        runs(
            "import sys; sys.exit('first line\\nema-timm: the reason\\nand the remedy')",
            "pass",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ),
        [None],
        lambda run, device: finished.append(run.variant.name) or "top-1 50%",
    )
    assert names(failed) == {"a": "the reason and the remedy", "c": "ended by signal 9"}
    assert finished == ["b"]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[1/3] a, seed 1: failed: the reason and the remedy, ")
    assert said[0].endswith("; 2 runs left")
    assert said[1].startswith("[2/3] b, seed 1: top-1 50%, ")
    assert "left" not in said[2]


def test_a_crash_after_an_own_message_is_reported_by_its_last_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("ema-timm: a warning\nTraceback (most recent call last):\n  x\nKeyError: 1\n")
    assert schedule.failure_reason(log, 1) == "KeyError: 1"
    log.write_text("")
    assert schedule.failure_reason(log) == "interrupted"
    assert schedule.failure_reason(log, 3) == "ended with exit code 3"


def test_each_epoch_is_reported_with_the_time_left(runs, capsys):
    """Also if stderr is not a terminal."""
    script = (
        "import json, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[2])\n"
        "for count in (1, 2):\n"
        "    epochs = [{'epoch': n + 1, 'top1': 50.0 + n, 'images': 9} for n in range(count)]\n"
        "    file.write_text(json.dumps(epochs)); time.sleep(0.5)\n"
    )
    assert not schedule.run_all(runs(script, "pass"), [None], lambda *_: "top-1 50%")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("a, seed 1: epoch 1/2, top-1 50.00% of 9 validation images; about ")
    assert " left, until " in said[0]
    assert said[1].startswith("a, seed 1: epoch 2/2, top-1 51.00% of 9 validation images")
    assert said[2].startswith("[1/2] a, seed 1: top-1 50%, ")
    assert " 1 runs left; about " in said[2]
    assert said[3].startswith("[2/2] b, seed 1: top-1 50%, ")
    assert " left" not in said[3]


def test_a_run_that_cannot_be_measured_is_one_that_failed(runs):
    def finish(run, device):
        raise UserError("no test image")

    assert names(schedule.run_all(runs("pass"), [None], finish, False)) == {"a": "no test image"}


def test_devices_work_at_the_same_time(runs, tmp_path):
    """Each of two runs waits for the other: one after the other they would fail."""
    wait = (
        "import pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / sys.argv[1]).touch()\n"
        "end = time.monotonic() + 60\n"
        "while not ((here / 'one').exists() and (here / 'two').exists()):\n"
        "    time.sleep(0.01)\n"
        "    if time.monotonic() > end: sys.exit('alone')\n"
    )
    where = []
    failed = schedule.run_all(
        runs(wait, wait), ["one", "two"], lambda run, device: where.append(device) or "", False
    )
    assert not failed
    assert sorted(where) == ["one", "two"]


def test_ctrl_c_lets_runs_end_their_step_and_starts_no_other(runs, tmp_path):
    saving = (
        "import pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n"
        "    (here / 'asked').open('a').write('x')\n"
        "    time.sleep(0.5); (here / 'saved').touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(here / 'running').touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt():
        while not (tmp_path / "running").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(InterruptedRunError, match="2 of 2 runs to do"):
        schedule.run_all(
            runs(saving, f"open({str(tmp_path / 'other')!r}, 'w')"), [None], lambda *_: "", False
        )
    thread.join()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text() == "x"  # once: a second would not wait for the step
    assert not (tmp_path / "other").exists()
