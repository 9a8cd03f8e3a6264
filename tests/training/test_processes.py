"""Several processes of one run stop, refuse and resume as one."""

import json
import shutil
import signal

import pytest
from support.runs import assert_same_outcome, cli
from support.several import in_processes

from ema_timm.training.resume import spread

EVENTFUL = [
    *("--batch-size", 3, "--drop-path", 0.1, "--hflip", 0.5, "--average-weights", 0.9),
    "--resume",
]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "at", "more"),
    [
        (2, ("TrainStep.__call__", 14), ["--grad-accum-steps", 3]),
        (2, ("Tally.add", 2), []),
        (3, ("TrainStep.__call__", 3), []),
    ],
)
def test_a_signal_to_one_process_stops_all_and_they_continue_exactly(
    config, tmp_path, count, at, more
):
    """Three processes add up gradients in another order before DDP has arranged its buckets."""
    config.epochs = 2
    args = [*cli(config, *EVENTFUL), *map(str, more)]
    whole = {"count": count, "args": [*args, "--output", tmp_path / "whole"]}
    same = {"count": count, "args": args}
    stopped = {**same, "rank": count - 1, "at": at}
    codes, said = zip(*in_processes(whole, stopped, same), strict=True)
    assert codes == ([0] * count, [128 + signal.SIGTERM] * count, [0] * count), said
    assert said[1].count("ema-timm: stopped; continue with") == 1, said[1]
    assert "from epoch" in said[2] and "Traceback" not in "".join(said)
    outcomes = [results_of(tmp_path / name) for name in ("run", "whole")]
    assert_same_outcome(*outcomes, config.output, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes_and_says_what_changes(config, tmp_path):
    args = cli(config, *EVENTFUL, "--grad-accum-steps", 2, "--epochs", 2)
    stopped = {"count": 2, "args": args, "rank": 1, "at": ("TrainStep.__call__", 5)}
    commands = stopped, {"count": 1, "args": args}, {"count": 2, "args": args}
    codes, said = zip(*in_processes(*commands), strict=True)
    assert codes == ([143, 143], [0], [0, 0]), said
    line = "1 process(es) instead of 2: a step has 6 images instead of 12, at the same --lr."
    assert said[1].count(line) == 1, said[1]
    assert "from epoch 1, step 17" in said[1]  # four steps of two batches in two processes
    assert "instead of" not in said[2]  # it is finished
    results = results_of(tmp_path / "run")
    assert [entry["epoch"] for entry in results["history"]] == [1, 2]
    assert results["metrics"]["images"] == 23


@pytest.mark.slow
def test_if_one_process_refuses_all_leave_with_its_line(config, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    bad = sorted(data.glob("train/*/*.png"))[1]  # which the second process decodes
    bad.write_bytes(bad.read_bytes()[:-30])
    commands = [
        ([*cli(config), "--data-dir", data], f"cannot read {bad}"),
        (["finetune", "--resume", "--output", config.output], "holds no run"),
        (cli(config, "--batch-size", 99), "more than the 60 training images"),
        (cli(config, "--epochs", 1, "--batch-size", 6), None),
        (cli(config, "--epochs", 1), "already holds a run"),
        (cli(config, "--resume", "--epochs", 1, "--batch-size", 5), "--batch-size is 5, but"),
    ]
    done = in_processes(*[{"count": 2, "args": args} for args, _ in commands])
    for (codes, said), (_, expected) in zip(done, commands, strict=True):
        lines = [line for line in said.splitlines() if line.startswith("ema-timm: ")]
        assert codes == ([2, 2] if expected else [0, 0]), said
        assert len(lines) == (1 if expected else 0) and (expected or "") in "".join(lines), said
        assert "Traceback" not in said and "connectFullMesh" not in said, said


@pytest.mark.slow
def test_the_others_say_in_one_line_that_a_process_was_killed_and_the_run_continues(config):
    args = cli(config, "--resume", "--batch-size", 6, "--epochs", 2)
    killed = {"count": 2, "args": args, "rank": 1, "signal": signal.SIGKILL}
    killed["at"] = ("TrainStep.__call__", 7)
    (codes, said), (again, rest) = in_processes(killed, {"count": 2, "args": args})
    assert codes == [1, -signal.SIGKILL], said
    assert said.count("lost the connection to another process") == 1, said
    assert "Traceback" not in said, said
    assert again == [0, 0] and "from epoch 2, step 1" in rest, rest


@pytest.mark.parametrize(
    ("done", "before", "now", "batches", "step"),
    [(8, 2, 1, 1, 16), (8, 2, 3, 1, 5), (7, 1, 2, 2, 2), (10, 2, 3, 1, 6), (0, 2, 1, 1, 0)],
)
def test_another_number_of_processes_continues_after_the_images_that_were_trained_on(
    done, before, now, batches, step
):
    """Rounded down to a whole step. An epoch of ten batches stays complete."""
    ranks = [{"loss_sum": float(done * rank)} for rank in range(before)]
    state = {"step": done, "steps": 10, "identity": {"processes": before}, "ranks": ranks}
    spread_out = spread(state, now, 20 // now, batches)
    assert spread_out["step"] == step
    mean = sum(range(before)) / before
    assert spread_out["loss_sum"] == pytest.approx(mean * step)
    assert spread_out["rng"] is None and spread_out["gradients"] == {}
