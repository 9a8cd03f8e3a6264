"""``YOLO.export(format="ncnn")``, which hands the network itself to pnnx, with EMA attention."""

from pathlib import Path

import pytest
import torch
from support.yolo import save, trained_like, ultralytics, with_rows, write_yaml
from torch import nn
from ultralytics import YOLO

from ema_timm.export.ncnn import open_ncnn
from ema_timm.integrations.yolo import EmaAttnRow

pytest.importorskip("ncnn", reason="needs the extra ncnn")
pytest.importorskip("pnnx", reason="needs the extra ncnn")
if tuple(map(int, ultralytics.__version__.split(".")[:2])) < (8, 4):
    pytest.skip("older versions download pnnx themselves", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
GAIN = 2.0  # of layers that `inject` puts into trained detectors


def rows(folder):
    config = with_rows("yolov8n.yaml", [-1, 1, "EmaAttn", ["c2", 32, GAIN]])
    return YOLO(write_yaml(config, folder / "yolov8n-ema.yaml"))


def inside_blocks(folder):
    """Behind the last bottleneck of every block, where rows cannot be."""
    yolo = YOLO("yolov8n.yaml")
    for block in yolo.model.model:
        if type(block).__name__ == "C2f":
            block.m[-1] = nn.Sequential(block.m[-1], EmaAttnRow(block.c, 32, GAIN))
    return yolo


def with_random_layers(net):
    torch.manual_seed(0)
    for module in trained_like(net).modules():
        if isinstance(module, EmaAttnRow):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize(
    ("build", "layers", "size", "half"),
    [
        (rows, 3, 96, False),
        (inside_blocks, 8, 96, True),
        pytest.param(rows, 3, 224, True, marks=pytest.mark.long),
        pytest.param(rows, 3, 96, True, marks=pytest.mark.long),
        pytest.param(rows, 3, 224, False, marks=pytest.mark.long),
        pytest.param(inside_blocks, 8, 96, False, marks=pytest.mark.long),
        pytest.param(inside_blocks, 8, 224, False, marks=pytest.mark.long),
        pytest.param(inside_blocks, 8, 224, True, marks=pytest.mark.long),
    ],
)
def test_the_file_computes_what_the_detector_computes(build, layers, size, half, tmp_path):
    yolo = build(tmp_path)
    assert sum(isinstance(m, EmaAttnRow) for m in yolo.model.modules()) == layers
    with_random_layers(yolo.model)
    save(yolo, tmp_path / "best.pt")
    exported = Path(YOLO(tmp_path / "best.pt").export(format="ncnn", imgsz=size, half=half))
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = YOLO(tmp_path / "best.pt").model.float().eval()(x)[0]
    found = open_ncnn(exported / "model.ncnn.param")(x)
    for part in (slice(4), slice(4, None)):  # boxes in pixels, and scores
        difference = (found[:, part] - want[:, part]).abs().max() / want[:, part].abs().max()
        assert difference < (1e-2 if half else 1e-4)
    numbers = sum(p.numel() for p in yolo.model.parameters())
    assert (exported / "model.ncnn.bin").stat().st_size < (2.4 if half else 4.4) * numbers
