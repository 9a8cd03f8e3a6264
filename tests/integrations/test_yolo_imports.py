"""The rows are known to YOLO's builders, whatever a process imports first."""

import os
import subprocess
import sys
import types

import pytest

from ema_timm.integrations.yolo.layer import register

# The parts of YOLOv5's models/yolo.py that matter here: it imports torch itself, its blocks come
# from another module, and its builder evaluates names in its own.
COMMON = """
import torch
from torch import nn

class Bottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1 = nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x):
        return x + self.cv1(x)

class C3(nn.Module):
    def __init__(self, c1, c2, n=1):
        super().__init__()
        self.cv1 = nn.Conv2d(c1, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(c2) for _ in range(n)))
    def forward(self, x):
        return self.m(self.cv1(x))
"""
YOLO = """
import contextlib, sys, pathlib
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from models.common import *

def parse_model(rows, ch):
    layers, c2 = [], ch[-1]
    for i, (f, n, m, args) in enumerate(rows):
        m = eval(m) if isinstance(m, str) else m
        for j, a in enumerate(args):
            with contextlib.suppress(NameError):
                args[j] = eval(a) if isinstance(a, str) else a
        if m is C3:
            c2 = args[0]
            args = [ch[f], c2, n]
            n = 1
        else:
            c2 = ch[f]
        m_ = nn.Sequential(*(m(*args) for _ in range(n))) if n > 1 else m(*args)
        layers.append(m_)
        if i == 0:
            ch = []
        ch.append(c2)
    return nn.Sequential(*layers)

if __name__ == "__main__":
    rows = [[-1, 2, "C3", [16]], [-1, 1, "EmaAttn", [8]], [-1, 1, "EmaAttnInside", ["C3"]]]
    print([n for n, m in parse_model(rows, [3]).named_modules() if type(m).__name__ == "EmaAttn"])
"""
USE = """
rows = [[-1, 2, "C3", [16]], [-1, 1, "EmaAttn", [8]], [-1, 1, "EmaAttnInside", ["C3"]]]
print([n for n, m in parse_model(rows, [3]).named_modules() if type(m).__name__ == "EmaAttn"])
"""
INSIDE = "['0.m.0.ema', '0.m.1.ema']"


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "models").mkdir()
    for name, text in {"__init__": "", "common": COMMON, "yolo": YOLO}.items():
        (tmp_path / "models" / f"{name}.py").write_text(text)
    return tmp_path


NAMES = ("models.yolo", "torch", "timm", "ema_timm", "ultralytics.nn.tasks")
ORDERS = [NAMES[i:] + NAMES[:i] for i in range(len(NAMES))] + [NAMES[::-1]]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_of_imports_knows_the_rows(python, clone, order):
    pytest.importorskip("ultralytics")
    code = "".join(f"import {name}\n" for name in order)
    code += "import ultralytics.nn.tasks as tasks, timm\n"
    code += "assert {'EmaAttn', 'EmaAttnInside'} <= vars(tasks).keys()\n"
    code += "assert timm.is_model('resnet18_ema')\n"
    code += f"from models.yolo import parse_model{USE}"
    assert python(code, env={"PYTHONPATH": str(clone)}).splitlines()[-1] == INSIDE


def test_yolov5_alone_knows_the_rows(python, clone):
    code = f"from models.yolo import parse_model{USE}"
    assert python(code, env={"PYTHONPATH": str(clone)}).splitlines()[-1] == INSIDE


def test_yolov5s_own_script_knows_the_rows(clone):
    for script, folder in (("models/yolo.py", clone), ("yolo.py", clone / "models")):
        command = [sys.executable, script]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.stdout.splitlines()[-1:] == [INSIDE], done.stderr


def test_a_script_of_another_project_is_left_alone(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "yolo.py").write_text("import torch\nprint('EmaAttn' in globals())\n")
    command = [sys.executable, os.path.join("models", "yolo.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n", done.stderr


def test_registering_twice_changes_nothing():
    module = types.ModuleType("models.yolo")
    module.parse_model = None
    register(module)
    before = dict(vars(module))
    register(module)
    assert vars(module) == before and {"EmaAttn", "EmaAttnInside"} <= before.keys()
