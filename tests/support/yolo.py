"""Model YAMLs for tests: the user's ultralytics' own, with rows of EMA attention."""

import copy
import os
import tempfile

import pytest
import yaml
from torch import nn

# ultralytics keeps settings in the user's home otherwise.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo-settings-"))
ultralytics = pytest.importorskip("ultralytics")

from ultralytics.nn.tasks import yaml_model_load  # noqa: E402

from ema_timm.integrations.yolo.rows import insert_rows, rows_of  # noqa: E402

ROW = [-1, 1, "EmaAttn", ["c2"]]


def trained_like(net):
    """Norms as training leaves them, so that no part of the network is idle."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def with_rows(name, row=ROW, after=None):
    """Content of a YAML with ``row`` behind what feeds the last row, or behind rows ``after``."""
    config = yaml_model_load(name)
    rows = rows_of(config)
    if after is None:
        last = rows[-1][0]
        after = [len(rows) - 2] if last == -1 else last
    return insert_rows(config, after, copy.deepcopy(row)).config


def write_yaml(config, path):
    """A file that ultralytics builds the network from."""
    content = {key: value for key, value in config.items() if key not in ("yaml_file", "scale")}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def save(yolo, path):
    """A checkpoint in half precision, which old versions of ultralytics do not make of a YAML."""
    yolo.ckpt = {**(yolo.ckpt or {}), "model": copy.deepcopy(yolo.model).half()}
    yolo.save(path)
