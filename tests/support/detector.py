"""The smallest detector with EMA attention, as a folder that was measured on a few pictures."""

import yaml
from support import yolo  # skips without ultralytics
from support.digit_scenes import SIDE, write_scenes

from ema_timm.integrations.yolo.measure import make_folder

ROWS = {
    "nc": 1,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "EmaAttn", ["c2"]],
    ],
    "head": [[[3], 1, "Detect", ["nc"]]],
}


def write_detector(folder):
    """Write pictures, a checkpoint and the folder below ``folder``; returns the last."""
    (folder / "set").mkdir()
    scenes = write_scenes(folder / "set", {"train": 2, "val": 6})
    (folder / "tiny.yaml").write_text(yaml_text())
    network = yolo.ultralytics.YOLO(folder / "tiny.yaml")
    network.model.names = {0: "digit"}
    yolo.save(network, folder / "tiny.pt")
    settings = {"data": scenes, "imgsz": SIDE, "device": "cpu"}
    return make_folder(folder / "tiny.pt", folder / "made", **settings)[0]


def yaml_text():
    """The model YAML, written as a user would."""
    return yaml.safe_dump(ROWS, sort_keys=False)
