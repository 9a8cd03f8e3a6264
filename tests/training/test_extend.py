"""A finished run goes on with more epochs, as a new run that says so."""

import json

import pytest
import torch
from support.runs import run, timeless

from ema_timm.cli import main
from ema_timm.training.resume import RunState
from ema_timm.training.step import TrainStep


def test_a_finished_run_goes_on_from_its_last_weights(config, tmp_path, capsys):
    first = run(config, epochs=2)
    last = RunState(config.output).load()["model"]
    resume = ["finetune", "--resume", "--output", config.output, "--epochs", "4"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = TrainStep.__call__

        def look(self, *batch):
            if not seen:
                weights = {k: v.clone() for k, v in self.model.state_dict().items()}
                seen.append((weights, len(self.optimizer.state)))
            return step(self, *batch)

        patch.setattr(TrainStep, "__call__", look)
        assert main(resume) == 0
    said = capsys.readouterr().err
    assert "epochs 3 to 4 are a new run from its last weights" in said, said
    assert all(torch.equal(tensor, seen[0][0][name]) for name, tensor in last.items())
    assert seen[0][1] == 0  # an optimiser of its own
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["extended_after"] == [2]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "finished after epoch 2 and extended" in card, card
    assert results["arguments"]["epochs"] == 4
    assert timeless(results)[:2] == timeless(first)
    assert [entry["epoch"] for entry in results["history"]] == [1, 2, 3, 4]
    assert results["metrics"]["top1"] == max(e["top1"] for e in results["history"])


def test_its_schedule_is_that_of_the_epochs_that_are_left(config):
    rates = []
    run(config, epochs=1, warmup_epochs=0)
    with pytest.MonkeyPatch.context() as patch:
        step = TrainStep.__call__

        def look(self, *batch):
            value = step(self, *batch)
            rates.append(self.optimizer.param_groups[0]["lr"])
            return value

        patch.setattr(TrainStep, "__call__", look)
        run(config, epochs=3, warmup_epochs=0, resume=True)
    assert rates[0] == pytest.approx(config.lr)
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * config.lr


def test_only_a_finished_run_is_extended_and_only_by_epochs(config, capsys):
    run(config, epochs=2)
    resume = ["finetune", "--resume", "--output", config.output]
    assert main([*resume, "--epochs", "4", "--lr", "0.1"]) == 2
    assert "--lr is 0.1" in capsys.readouterr().err
    assert main([*resume, "--epochs", "1"]) == 2
    assert "--epochs is 1, but the run was started with 2" in capsys.readouterr().err
