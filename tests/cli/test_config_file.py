"""Settings of a run from a YAML file."""

import pytest

from ema_timm.cli import main
from ema_timm.training import run as finetune
from ema_timm.training.settings import FinetuneConfig


@pytest.fixture
def started(monkeypatch):
    """The settings that `finetune` is called with, in place of a run."""
    seen = []

    def note(config, resume):
        seen.append(config)
        return {"metrics": {"top1": 0.0, "images": 1}}

    monkeypatch.setattr(finetune, "finetune", note)
    return seen


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_says_what_options_would_and_the_command_line_wins(file, started):
    text = (
        "model: test_resnet_ema\ndata_dir: flowers\noutput: runs/a\nlr: 5e-4\nval-split: 0.2\n"
        "epochs: 7\namp: true\nmodel_kwargs: {ema_groups: 8}\nrecord: [csv]\nweights:\n"
    )
    assert main(["finetune", "-c", file(text), "--epochs", "3", "--no-amp"]) == 0
    assert (
        main(
            [
                *("finetune", "--model", "test_resnet_ema", "--data-dir", "flowers"),
                *("--output", "runs/a", "--lr", "5e-4", "--val-split", "0.2", "--epochs", "3"),
                *("--no-amp", "--model-kwargs", "ema_groups=8", "--record", "csv"),
            ]
        )
        == 0
    )
    assert started[0] == started[1]
    assert started[0].lr == 5e-4 and type(started[0].lr) is float


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize: 3", "unknown setting batchsize. Did you mean batch_size?"),
        ("model_ema: true", "unknown setting model_ema."),
        ("epochs: many", "epochs must be a whole number"),
        ("epochs: 2.5", "epochs must be a whole number"),
        ("lr: true", "lr must be a number"),
        ("amp: 'on'", "amp must be true or false"),
        ("amp_dtype: float8", "amp_dtype must be one of bfloat16, float16"),
        ("record: [wandb]", "record must be a list of csv, tensorboard"),
        ("model_kwargs: 3", "model_kwargs must be a mapping"),
        ("model: [a]", "model must be text"),
        ("- lr", "must contain lines such as"),
        ("lr: [", "is not valid YAML: line 1: "),
        ("[" * 200_000, "is not valid YAML"),
        ("lr: 0.1\nseed: 1\nlr: 0.2", "line 3: lr is given twice, first in line 1"),
        ("lr:\nlr: 0.2", "line 2: lr is given twice"),
        ("val_split: 0.1\nval-split: 0.2", "line 2: val-split is given twice, first in line 1"),
        ("model_kwargs:\n  a: 1\n  a: 2", "line 3: a is given twice, first in line 2"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(file, started, capsys, text, said):
    assert main(["finetune", "--config", file(text), "--output", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not started


def test_a_merge_key_may_be_overridden(file, started):
    text = "model: test_resnet_ema\ndata_dir: d\noutput: o\n"
    text += "model_kwargs:\n  <<: {a: 1, b: 2}\n  b: 3\n"
    assert main(["finetune", "-c", file(text)]) == 0
    assert started[0].model_kwargs == {"a": 1, "b": 3}


def test_a_file_that_is_not_there_is_named(started, capsys):
    assert main(["finetune", "--config", "gone.yaml"]) == 2
    assert "cannot read gone.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_a_second_file_is_refused_because_it_would_replace_the_first(command, file, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "-c", file("lr: 0.1"), "--config", file("lr: 0.2")])
    assert left.value.code == 2
    assert "argument -c/--config: is given twice" in capsys.readouterr().err


def test_every_default_can_stand_in_a_file(file, started):
    import dataclasses

    import yaml

    config = FinetuneConfig(model="m", data_dir="d", output="o")
    assert main(["finetune", "-c", file(yaml.safe_dump(dataclasses.asdict(config)))]) == 0
    assert started == [config]


def test_bars_are_those_of_the_place_they_are_shown_in():
    from tqdm.auto import tqdm

    from ema_timm.data import check
    from ema_timm.measure import metrics
    from ema_timm.training import data, epoch, log

    assert {module.tqdm for module in (check, metrics, data, epoch, log)} == {tqdm}
