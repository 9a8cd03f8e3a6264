"""What a run resumes from."""

import pytest
import torch

from ema_timm.errors import UserError
from ema_timm.training.lock import lock_run
from ema_timm.training.resume import RunState


@pytest.fixture
def state(tmp_path):
    state = RunState(tmp_path / "run")
    state.folder.mkdir(parents=True)
    return state


def test_state_round_trip_without_pickled_code(state):
    content = {"tensor": torch.arange(3.0), "history": [{"top1": 1.5}], "rng": ["MT", [1, 2], 0.0]}
    state.save(content)
    loaded = state.load()
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    assert loaded == content


def test_damaged_state_is_refused(state):
    state.save({"epoch": 1})
    content = state.file.read_bytes()
    state.file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        state.load()


def test_folders_that_cannot_be_used_are_refused(state, tmp_path):
    state.check(resume=True)  # nothing is there: a run starts
    with pytest.raises(UserError, match=r"holds no run\. To start one, add --model"):
        state.load()
    state.save({})
    state.check(resume=True)
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        state.check(resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        lock_run(RunState(tmp_path / "file" / "run"), resume=False).__enter__()
