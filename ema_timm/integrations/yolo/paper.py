"""The paper's two detectors for the original YOLOv5, written from the user's own copy of it.

Placement, settings and figures are the paper's and its authors' (ICASSP 2023, arXiv:2305.13563;
the places of the layers are those of their released model YAMLs). No YAML of YOLOv5 or of the
authors is part of this package: rows are moved and inserted in the user's own one.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import yaml

from ema_timm.errors import UserError
from ema_timm.integrations.yolo.rows import NAME, insert_rows, rows_of, yaml_text

_ROW = (-1, 1, NAME, ["c2"])

_COCO = """\
# COCO 2017, YOLOv5s with EMA attention, 300 epochs, 640 pixels.
#
# In the root of a clone of YOLOv5 (v6.0 is the paper's), with ema-timm installed:
#
#   ema-timm recipes coco_yolov5s_ema > models/yolov5s_ema.yaml
#   python train.py --data coco.yaml --cfg yolov5s_ema.yaml --weights yolov5s.pt \\
#       --batch-size 64 --epochs 300 --device 0
#   python val.py --data coco.yaml --img 640 --conf 0.001 --iou 0.65 \\
#       --weights runs/train/exp/weights/best.pt
#
# The paper reports 57.8 mAP@.5 and 38.4 mAP@.5:.95; its baseline 56.0 and 37.2.
# This project has not measured it again. 7,238,685 parameters, as the authors' YAML has; the
# baseline has 7,235,389. The paper's 16.53 GFLOPs is the count of the network without the layers.
# YOLOv5 loads --weights by name and shape, so rows behind the first layer start anew.
#
# The same placement in ultralytics, where every weight is kept:
#   ema-timm yolo yolov5su.pt --after 6 8 --output yolov5su-ema.pt
#   ema-timm yolo yolo11s.pt --after 6 8 --output yolo11s-ema.pt
"""

_VISDRONE = """\
# VisDrone 2019, YOLOv5x with a fourth scale (P2) and EMA attention, 300 epochs, 640 pixels.
#
# In the root of a clone of YOLOv5 (v6.0 or later), with ema-timm installed:
#
#   ema-timm recipes visdrone_yolov5x_p2_ema > models/yolov5x_p2_ema.yaml
#   python train.py --data VisDrone.yaml --cfg yolov5x_p2_ema.yaml --weights yolov5x.pt \\
#       --batch-size 6 --epochs 300 --img 640 --device 0
#   python val.py --data VisDrone.yaml --img 640 --weights runs/train/exp/weights/best.pt
#
# The paper reports 49.70 mAP@.5 and 30.4 mAP@.5:.95; its baseline 49.29 and 30.0.
# This project has not measured it again. 90,974,820 parameters; the baseline has 90,963,540. The
# authors' YAML has 91,179,620, because references were not moved when the five layers were
# inserted: one concatenation reads a wider map, and the last row the maps before the layers. Here
# the references are right.
#
# The same placement in ultralytics, where every weight is kept:
#   ema-timm yolo yolov8x.pt --after 12 15 18 --output yolov8x-ema.pt
"""


def recipes() -> dict[str, str]:
    """The purpose of each recipe by its name, in one line."""
    return {
        name: text.partition("\n")[0].removeprefix("# ") for name, (text, _) in _RECIPES.items()
    }


def read(name: str, folder: Path | None = None) -> str:
    """A recipe's text: how to use it, and a model YAML for YOLOv5.

    Args:
        name: One of `recipes`.
        folder: Folder of YOLOv5's model YAMLs; by default ``models`` in the current folder, a clone
            of YOLOv5, or in the installed package.

    Raises:
        UserError: If there is no YOLOv5, or its YAML is of an unknown release.
    """
    text, build = _RECIPES[name]
    return f"{text}\n{yaml_text(build(folder or _models_folder()))}"


def yolov5s_ema(folder: Path) -> dict:
    """YOLOv5s with a layer after the last two C3 of the backbone, at strides 16 and 32."""
    config = _base(folder / "yolov5s.yaml")
    rows = rows_of(config)[: len(config["backbone"])]
    blocks = [i for i, row in enumerate(rows) if row[2] == "C3"]
    return insert_rows(config, blocks[-2:], _ROW).config


def yolov5x_p2(folder: Path) -> dict:
    """The authors' baseline: YOLOv5x with the stem and pyramid of v5.0 and a scale of stride 4."""
    config = _base(folder / "yolov5x.yaml")
    backbone, head = config["backbone"], config["head"]
    backbone[0] = [-1, 1, "Focus", [64, 3]]
    backbone[4][1] = 9
    backbone[8:10] = [[-1, 1, "SPP", [1024, [5, 9, 13]]], [-1, 3, "C3", [1024, False]]]
    # Up to stride 4 as the head goes up to 8, and down again: rows 18 to 24 of the new YAML.
    lateral, upsample = copy.deepcopy(head[4:6])
    block, down = copy.deepcopy(head[7]), copy.deepcopy(head[8])
    up = [lateral, upsample, [[-1, 2], 1, "Concat", [1]], block]
    back = [down, [[-1, 18], 1, "Concat", [1]], block]
    head[8:8] = copy.deepcopy(up + back)
    head[-1] = [[21, 24, 27, 30], 1, "Detect", ["nc", "anchors"]]
    config["anchors"] = [[5, 6, 8, 14, 15, 11], *config["anchors"]]
    config["nc"] = 10
    return config


def yolov5x_p2_ema(folder: Path) -> dict:
    """`yolov5x_p2` with a layer after every C3 of the head except the last."""
    config = yolov5x_p2(folder)
    split = len(config["backbone"])
    rows = rows_of(config)
    blocks = [i for i, row in enumerate(rows) if i >= split and row[2] == "C3"]
    return insert_rows(config, blocks[:-1], _ROW).config


def _base(path: Path) -> dict:
    """A model YAML of YOLOv5 v6.0 or later, whose rows the placements count on."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Give a whole copy of YOLOv5.") from error
    names = [row[2] for row in rows_of(config)]
    backbone = ["Conv", "Conv", "C3", "Conv", "C3", "Conv", "C3", "Conv", "C3", "SPPF"]
    head = ["Conv", "nn.Upsample", "Concat", "C3"] * 2 + ["Conv", "Concat", "C3"] * 2 + ["Detect"]
    if names != backbone + head:
        raise UserError(f"{path} is not that of YOLOv5 v6.0 or later. Check out v6.0 or v7.0.")
    return config


def _models_folder() -> Path:
    found = [Path("models")]
    package = importlib.util.find_spec("yolov5")
    if package and package.submodule_search_locations:
        found += [Path(place) / "models" for place in package.submodule_search_locations]
    for folder in found:
        if (folder / "yolo.py").is_file() and (folder / "yolov5s.yaml").is_file():
            return folder
    raise UserError(
        "this recipe is written from the model YAMLs of YOLOv5, and there are none here. Run it in "
        "the root of a clone of https://github.com/ultralytics/yolov5."
    )


_RECIPES: dict[str, tuple[str, Callable[[Path], dict]]] = {
    "coco_yolov5s_ema": (_COCO, yolov5s_ema),
    "visdrone_yolov5x_p2_ema": (_VISDRONE, yolov5x_p2_ema),
}
