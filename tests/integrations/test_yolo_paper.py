"""The paper's two detectors on YOLOv5: placement, counts, and how to train them."""

import copy

import pytest
import yaml
from support.yolo import with_rows
from ultralytics.nn import tasks

from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.integrations.yolo import EmaAttnRow, paper
from ema_timm.integrations.yolo.rows import rows_of

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours

NAMES = ["coco_yolov5s_ema", "visdrone_yolov5x_p2_ema"]
SCALES = {"s": (0.33, 0.5), "x": (1.33, 1.25)}
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What the recipes read in a clone of YOLOv5, made from ultralytics' YAML of the same rows."""
    folder = tmp_path_factory.mktemp("yolov5") / "models"
    folder.mkdir()
    (folder / "yolo.py").touch()
    for scale, (depth, width) in SCALES.items():
        config = tasks.yaml_model_load("yolov5s.yaml")
        config = {
            "nc": 80,
            "depth_multiple": depth,
            "width_multiple": width,
            "anchors": ANCHORS,
            "backbone": config["backbone"],
            "head": [*config["head"][:-1], [[17, 20, 23], 1, "Detect", ["nc", "anchors"]]],
        }
        (folder / f"yolov5{scale}.yaml").write_text(yaml.safe_dump(config))
    return folder


def count(config):
    """Parameters of YOLOv5's network: its rows by ultralytics' builder, its head by its formula."""
    rows = copy.deepcopy({**config, "head": config["head"][:-1]})
    layers, _ = tasks.parse_model(rows, 3, verbose=False)
    widths = {}
    for index in config["head"][-1][0]:
        module = layers[index]
        widths[index] = getattr(module, "channels", None) or module.cv3.conv.out_channels
    outputs = 3 * (config["nc"] + 5)
    return sum(p.numel() for p in layers.parameters()) + sum(
        (width + 1) * outputs for width in widths.values()
    )


def test_yolov5s_has_the_authors_count(clone):
    config = paper.yolov5s_ema(clone)
    assert count(config) == 7_238_685
    assert count(yaml.safe_load((clone / "yolov5s.yaml").read_text())) == 7_235_389
    assert [i for i, row in enumerate(rows_of(config)) if row[2] == "EmaAttn"] == [7, 10]


def test_yolov5x_p2_has_the_authors_count_but_for_their_unmoved_references(clone):
    config = paper.yolov5x_p2_ema(clone)
    assert count(paper.yolov5x_p2(clone)) == 90_963_540
    assert count(config) == 90_974_820
    assert [i for i, row in enumerate(rows_of(config)) if row[2] == "EmaAttn"] == [
        *(14, 19, 24, 28, 32)
    ]
    theirs = copy.deepcopy(config)
    unmoved = {26: [-1, 18], 30: [-1, 14], 36: [23, 27, 31, 35]}
    right = {26: [-1, 20], 30: [-1, 15], 36: [24, 28, 32, 35]}
    for number, froms in unmoved.items():
        row = theirs["head"][number - len(theirs["backbone"])]
        assert row[0] == right[number]
        row[0] = froms
    assert count(theirs) == 91_179_620


def test_yolov5s_own_builder_counts_the_same():
    module = pytest.importorskip("yolov5.models.yolo")
    models = paper._models_folder()
    for build, wanted in [
        (paper.yolov5s_ema, 7_238_685),
        (paper.yolov5x_p2, 90_963_540),
        (paper.yolov5x_p2_ema, 90_974_820),
    ]:
        model = module.Model(build(models))
        assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_a_whole_model_yaml(name, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone.parent)
    assert main(["recipes", name]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == paper._RECIPES[name][1](clone)
    for said in ("python train.py --data", "--epochs 300", "The paper reports", "not measured"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_list_shows_them_with_the_others(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*NAMES, "cifar100_resnet50_ema"))


def test_figures_are_the_papers():
    coco, visdrone = (paper._RECIPES[name][0] for name in NAMES)
    assert "57.8 mAP@.5 and 38.4 mAP@.5:.95" in coco
    assert "49.70 mAP@.5 and 30.4 mAP@.5:.95" in visdrone


def test_without_yolov5_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="clone") as error:
        paper.read(NAMES[0])
    assert "\n" not in str(error.value)


def test_another_release_is_refused(clone, tmp_path):
    config = yaml.safe_load((clone / "yolov5s.yaml").read_text())
    config["backbone"][0][2] = "Focus"
    (tmp_path / "yolov5s.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"v6\.0 or later"):
        paper.yolov5s_ema(tmp_path)


@pytest.mark.parametrize("family", ["yolov5", "yolov8", "yolo11", "yolo26"])
def test_the_same_placement_in_ultralytics(family):
    """Behind the blocks of strides 16 and 32 of the backbone, at the widths of each scale."""
    try:
        config = with_rows(f"{family}s.yaml", after=[6, 8])
    except FileNotFoundError:
        pytest.skip(f"this ultralytics has no {family}")
    model = tasks.DetectionModel(config, verbose=False)
    found = [m.channels for m in model.modules() if isinstance(m, EmaAttnRow)]
    assert found == [256, 512]
