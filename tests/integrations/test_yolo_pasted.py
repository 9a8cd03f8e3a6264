"""A detector with a pasted class, carried over to the layer as the guide says."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from support import guide, pasted_class
from support.yolo import save, with_rows, write_yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from ema_timm.integrations.yolo import EmaAttnRow

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A copy of ultralytics with a pasted class, as its users have: rows named EMA."""
    monkeypatch.setitem(sys.modules, "my_layers", pasted_class)
    monkeypatch.setattr(pasted_class.EMA, "__module__", "my_layers")
    monkeypatch.setattr(tasks, "EMA", lambda c: pasted_class.EMA(c, factor=8), raising=False)
    monkeypatch.chdir(tmp_path)
    config = with_rows("yolov8n.yaml", [-1, 1, "EMA", ["c2"]], [15, 18])
    yolo = YOLO(write_yaml(config, tmp_path / "yolov8n-fork.yaml"))
    for parameter in yolo.model.parameters():
        nn.init.normal_(parameter, std=0.05)
    save(yolo, tmp_path / "best.pt")
    return yolo


def test_best_pt_loads_where_its_class_is_ours_and_moves_into_rows(fork, tmp_path, monkeypatch):
    x = torch.rand(1, 3, 64, 96)
    half = fork.model.half().float().eval()
    with torch.no_grad():
        want = half(x)[0]
    alias, moved = guide.blocks()["A trained best.pt"]
    exec(alias, names := {})
    monkeypatch.setattr(pasted_class, "EMA", names["EMA"])
    loaded = torch.load("best.pt", weights_only=False)["model"].float().eval()
    layers = [m for m in loaded.modules() if isinstance(m, EmaAttnRow)]
    assert [(layer.channels, layer.groups) for layer in layers] == [(64, 8), (128, 8)]
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], want, rtol=1e-4, atol=1e-3)

    rows = with_rows("yolov8n.yaml", [-1, 1, "EmaAttn", [8]], [15, 18])
    write_yaml(rows, tmp_path / "rows.yaml")
    names = {}
    exec(moved, names)
    found = names["yolo"].model.eval()
    assert sum(isinstance(m, EmaAttnRow) for m in found.modules()) == 2
    own, theirs = found.state_dict(), loaded.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        torch.testing.assert_close(found(x)[0], want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("arguments", "groups"), [([], 32), ([8], 8), (["c2"], 32)], ids=str)
def test_the_rename_makes_public_rows_build(fork, tmp_path, arguments, groups):
    (command,) = guide.blocks("bash")["YOLO model YAMLs"]
    config = with_rows("yolov8n.yaml", [-1, 1, "EMA", arguments], [15, 18])
    write_yaml(config, tmp_path / "my-yolo.yaml")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    layers = [m for m in YOLO("my-yolo.yaml").model.modules() if isinstance(m, EmaAttnRow)]
    assert [layer.groups for layer in layers] == [groups, groups]


def test_every_row_of_the_table_does_what_it_says(fork):
    text = guide.GUIDE.read_text("utf-8")
    table = text[text.index("| row in public YAMLs") : text.index("A row with other arguments")]
    rows = [yaml.safe_load(row) for row in re.findall(r"`(\[.*?\])`", table)]
    assert len(rows) == 6
    for row in rows:
        config = with_rows("yolov8n.yaml", [*row[:2], "EmaAttn", row[3]], [15])
        if row[2] == "EMA" and row[3] in ([256], ["c2", "c2", 8]):
            with pytest.raises(ValueError, match="not understood"):
                tasks.DetectionModel(config, verbose=False)
        else:
            assert tasks.DetectionModel(config, verbose=False)
