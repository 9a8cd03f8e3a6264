"""A run's folder: one run at a time, and whatever it was killed at it can go on or start."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.runs import assert_same_outcome, cli, command, run, under_way

from ema_timm.checkpoints import folder
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.files import sha256, write_whole
from ema_timm.training import resume
from ema_timm.training.lock import lock_run
from ema_timm.training.resume import RunState
from ema_timm.training.step import TrainStep


def test_a_run_whose_disk_was_full_in_its_first_epoch_goes_on(stage, config, tmp_path):
    """Room for the weights, none for a state with the optimiser's moments."""
    whole = run(config, output=str(tmp_path / "whole"), epochs=1)
    weights = (tmp_path / "whole" / "model.safetensors").stat().st_size
    full = stage[1].run(*cli(config, "--epochs", 1), largest_file=int(weights * 1.5))
    assert full["code"] == 1, full["err"]
    assert "Traceback" not in full["err"], full["err"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    continued = run(config, epochs=1, resume=True)
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")


def test_a_full_disk_in_the_state_is_one_line(stage, config):
    done = stage[1].run(*cli(config), largest_file=300_000)
    assert done["code"] == 1
    assert "Traceback" not in done["err"], done["err"]
    last = done["err"].strip().splitlines()[-1]
    assert last.startswith("ema-timm: ") and "File too large" in last


class KilledError(BaseException):
    pass


@pytest.mark.parametrize(
    ("file", "times"),
    [("training/state.pt", 1), ("model.safetensors", 1), ("training/state.pt", 2)],
    ids=["before the first state", "before the first weights", "between weights and state"],
)
def test_a_run_killed_in_its_first_epoch_goes_on_or_starts(
    config, monkeypatch, tmp_path, file, times
):
    whole = run(config, output=str(tmp_path / "whole"), epochs=1)
    calls = []

    def killed(final, write, **more):
        name = final.relative_to(config.output).as_posix()
        calls.append(name)
        if name == file and calls.count(name) == times:
            raise KilledError
        return write_whole(final, write, **more)

    for module in (folder, resume):
        monkeypatch.setattr(module, "write_whole", killed)
    with pytest.raises(KilledError):
        run(config, epochs=1)
    monkeypatch.undo()
    done = run(config, epochs=1, resume=True)
    assert_same_outcome(done, whole, config.output, tmp_path / "whole")


def test_a_run_that_made_no_step_may_start_anew_with_other_settings(config, capsys, monkeypatch):
    assert main(cli(config, "--lr", "1e30")) == 2
    assert "the loss became" in capsys.readouterr().err
    results = run(config, epochs=1)
    assert results["arguments"]["lr"] == config.lr


def test_weights_without_a_state_are_never_overwritten(config, tmp_path, capsys):
    run(config, epochs=1)
    shutil.rmtree(tmp_path / "run" / "training")
    before = sha256(tmp_path / "run" / "model.safetensors")
    for args in (cli(config), ["finetune", "--resume", "--output", config.output]):
        assert main(args) == 2
        said = capsys.readouterr().err
        assert f"--model local-dir:{config.output}" in said, said
    assert sha256(tmp_path / "run" / "model.safetensors") == before
    assert not (tmp_path / "run" / "training").exists()


def test_weights_that_no_state_knows_are_not_called_the_best(config, monkeypatch, tmp_path):
    """On a GPU a repeated epoch may come out worse than the one whose state was lost."""
    run(config, epochs=2)
    saved = RunState(config.output)
    content = saved.load()
    content["config"]["epochs"] = content["identity"]["arguments"]["epochs"] = 3
    content["best"]["top1"] = 101.0  # nothing beats it
    saved.save(content)
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    results = run(config, resume=True)
    assert results["weights_sha256"] == sha256(weights)
    assert results["best_epoch"] == 3


@pytest.mark.parametrize(
    "more",
    [["--model", "resnet50_emma"], ["--batch-size", "61"], ["--aa", "foo"], ["--opt", "adamwx"]],
    ids=lambda more: more[1],
)
def test_a_start_that_fails_leaves_no_folder(config, tmp_path, more):
    assert main([*cli(config), *more, "--output", str(tmp_path / "new" / "run")]) == 2
    assert not (tmp_path / "new").exists()


def test_two_runs_do_not_share_a_folder(config, tmp_path, capsys):
    with under_way(config, "--epochs", 500) as first:
        for args in (cli(config), ["finetune", "--resume", "--output", config.output]):
            assert main(args) == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"{config.output} is in use by process {first.pid} on " in last
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=120)
        assert first.returncode == 130
    assert not (tmp_path / "run" / "training" / "lock").exists()


@pytest.mark.parametrize("again", [False, True])
def test_two_threads_do_not_share_a_folder(config, tmp_path, capsys, again):
    """To the operating system they are one process, which would get the lock again."""
    run(config, epochs=1)
    args = ["finetune", "--resume", "--output", config.output] if again else cli(config)
    with lock_run(RunState(config.output), resume=True):
        (tmp_path / "link").symlink_to(config.output)
        for output in (config.output, str(tmp_path / "link")):
            assert main([*args, "--output", output]) == 2
            said = capsys.readouterr().err
            assert f"{output} is in use by process {os.getpid()} on " in said, said
        done = subprocess.run(command(*args), capture_output=True, text=True)
        assert "is in use by process" in done.stderr  # the first has kept the system's lock
    assert main(["finetune", "--resume", "--output", config.output]) == 0


def test_two_runs_that_start_at_once_do_not_share_a_folder(config, tmp_path):
    both = [
        subprocess.Popen(command(*cli(config)), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["weights_sha256"] == sha256(tmp_path / "run" / "model.safetensors")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_leaves_a_lock_that_is_recognised(config, tmp_path, workers):
    with under_way(config, "--epochs", 500, "--workers", workers) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lock = tmp_path / "run" / "training" / "lock"
        assert lock.read_text().split()[1] == str(process.pid)
        leftover = tmp_path / "run" / f".model.safetensors.{process.pid}.tmp"
        leftover.write_bytes(b"half")
        with pytest.raises(UserError, match=r"--lr is 1\.0"):  # the lock did not refuse it
            run(config, epochs=500, lr=1.0, resume=True)
    assert not lock.exists() and not leftover.exists()


def test_a_run_removes_what_killed_processes_left_half_written(config, tmp_path):
    """Of whichever file, in both folders; a process that lives may still be writing its own."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder, alive = tmp_path / "run", os.getppid()
    (folder / "training").mkdir(parents=True)
    left = [
        folder / f".{dead.pid}.writable",
        *(folder / f".{name}.{dead.pid}.tmp" for name in ("results.json", "confusion.png")),
        folder / "training" / f".state.pt.{dead.pid}.tmp",
    ]
    kept = [folder / f".README.md.{alive}.tmp", folder / ".notes.tmp", folder / ".x.12a.tmp"]
    for file in (*left, *kept):
        file.write_bytes(b"half")
    run(config, epochs=1)
    assert not [file.name for file in left if file.exists()]
    assert all(file.read_bytes() == b"half" for file in kept)


def test_a_lock_of_another_machine_says_how_to_get_rid_of_it(config, tmp_path, capsys):
    run(config, epochs=1)
    lock = tmp_path / "run" / "training" / "lock"
    lock.write_text("elsewhere 12\n")
    resume = ["finetune", "--resume", "--output", config.output]
    assert main(resume) == 2
    said = capsys.readouterr().err
    assert "process 12 on elsewhere" in said and f"remove {lock}" in said
    lock.unlink()
    assert main(resume) == 0


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_job_that_was_moved_to_this_machine_takes_over_its_own_lock(config, monkeypatch, name):
    """A job that is requeued after a kill may come to another machine."""
    monkeypatch.setenv(name, "17")
    run(config, epochs=1)
    lock = resume.RunState(config.output).folder / "lock"
    lock.write_text("elsewhere 12 18\n")
    with pytest.raises(UserError, match="in use by process 12 on elsewhere"):
        run(config, epochs=1, resume=True)
    lock.write_text("elsewhere 12 17\n")
    run(config, epochs=1, resume=True)
    assert not lock.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before(config, tmp_path, capsys, damage):
    whole = run(config)
    saved = RunState(config.output)
    content = bytearray(saved.file.read_bytes())
    if damage == "cut":
        saved.file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        saved.file.write_bytes(content)
    else:  # killed while it was renamed
        saved.file.unlink()
    continued = run(config, resume=True)
    said = capsys.readouterr().err
    assert "state.pt is " in said and "state.previous.pt" in said
    assert continued["weights_sha256"] == whole["weights_sha256"]
    assert continued["metrics"] == whole["metrics"]


def test_when_both_states_are_damaged_the_weights_are_kept(config, tmp_path, capsys):
    run(config, epochs=2)
    saved = RunState(config.output)
    for file in (saved.file, saved.before):
        file.write_bytes(b"?")
    assert main(["finetune", "--resume", "--output", config.output]) == 2
    said = capsys.readouterr().err
    assert f"--model local-dir:{config.output}" in said and "emove" not in said
    assert main([*cli(config, "--epochs", 1), "--output", str(tmp_path / "b"), "--pretrained",
                 "--model", f"local-dir:{config.output}"]) == 0  # fmt: skip


def test_of_equal_accuracies_the_lower_loss_is_kept():
    from ema_timm.measure.metrics import Metrics
    from ema_timm.training.history import History

    history = History()
    kept = [
        history.add(epoch, 1.0, 1.0, Metrics(top1, None, top1, loss, 1, 2))
        for epoch, top1, loss in [(1, 50.0, 0.9), (2, 50.0, 0.7), (3, 50.0, 0.7), (4, 49.0, 0.1)]
    ]
    assert kept == [True, True, False, False]
    assert history.best["epoch"] == 2


def test_interrupted_is_not_begun(config, monkeypatch):
    """A run that was stopped in its first epoch holds steps, which a new start would lose."""
    step = TrainStep.__call__

    def interrupted(self, *batch):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert main(cli(config)) == 130
    monkeypatch.undo()
    with pytest.raises(UserError, match="already holds a run"):
        run(config)
