"""Detectors with EMA attention learn, resume, and leave PyTorch with the same boxes.

Takes minutes: ``pytest -m long tests/integrations/test_yolo_training.py``.
"""

import subprocess
import sys

import pytest
import torch
from support.digit_scenes import SIDE, write_scenes
from support.yolo import ultralytics
from ultralytics import YOLO

from ema_timm.integrations.yolo import EmaAttnRow, inject

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # ultralytics' own warnings are not ours
]
NEWEST = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
DETECTOR = "yolo11n.yaml" if NEWEST else "yolov8n.yaml"
CHANCE = 0.05  # mAP@.5 of boxes at random places; an untrained network has less


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("yolo")


@pytest.fixture(scope="module")
def scenes(folder):
    (folder / "set").mkdir()
    return write_scenes(folder / "set", {"train": 320, "val": 50})


@pytest.fixture(scope="module")
def settings(folder, scenes):
    return {
        "data": str(scenes),
        "imgsz": SIDE,
        "batch": 8,
        "workers": 0,
        "device": "cpu",
        "optimizer": "AdamW",
        "lr0": 2e-3,
        "warmup_epochs": 1,
        "mosaic": 0.0,
        "fliplr": 0.0,
        "scale": 0.1,
        "erasing": 0.0,
        "amp": False,
        "plots": False,
        "seed": 0,
        "project": str(folder / "runs"),
        "exist_ok": True,
    }


def measured(path, settings):
    keys = ("data", "imgsz", "batch", "workers", "device", "plots", "project", "exist_ok")
    metrics = YOLO(path).val(**{key: settings[key] for key in keys}, verbose=False, rect=False)
    return metrics.box.map50


@pytest.fixture(scope="module")
def start(folder, settings):
    """A plain detector, a little trained, as ultralytics saved it."""
    YOLO(DETECTOR).train(**settings, epochs=8, name="start")
    return folder / "runs" / "start" / "weights" / "last.pt"


@pytest.fixture(scope="module")
def injected(start, folder):
    path = folder / "start-ema.pt"
    inject(YOLO(start), "neck").save(path)
    return path


@pytest.fixture(scope="module")
def trained(injected, folder, settings):
    """Stopped after two epochs and resumed from its own checkpoint, in a network built anew."""

    class StoppedError(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 1:
            raise StoppedError

    yolo = YOLO(injected)
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(StoppedError):
        yolo.train(**settings, epochs=4, name="ema")
    last = folder / "runs" / "ema" / "weights" / "last.pt"
    resumed = YOLO(last)
    resumed.train(resume=True)
    assert resumed.trainer.start_epoch == 2
    return last


def test_injection_changes_no_measurement(start, injected, settings):
    before = measured(start, settings)
    assert before > 2 * CHANCE
    assert measured(injected, settings) == pytest.approx(before, abs=1e-6)


def test_both_learn_from_the_same_start(start, trained, folder, settings):
    YOLO(start).train(**settings, epochs=4, name="plain")
    plain = folder / "runs" / "plain" / "weights" / "last.pt"
    scores = measured(plain, settings), measured(trained, settings)
    assert min(scores) > 10 * CHANCE, scores


def test_the_layers_have_left_their_start(trained):
    layers = [m for m in YOLO(trained).model.modules() if isinstance(m, EmaAttnRow)]
    assert len(layers) == 4
    assert all(float(layer.gn.weight.abs().max()) > 1e-4 for layer in layers)


def test_training_reloads_in_a_process_that_imported_nothing(python, trained, scenes):
    code = """
import sys
from ultralytics import YOLO
(result,) = YOLO(sys.argv[1]).predict(sys.argv[2], imgsz=64, verbose=False, device="cpu")
print(len(result.boxes))
"""
    picture = scenes.parent / "images" / "val" / "0000.png"
    assert int(python(code, args=[trained, picture]).splitlines()[-1]) >= 1


def test_onnx_finds_the_same_boxes(trained, scenes, monkeypatch, folder):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(folder)
    exported = YOLO(trained).export(format="onnx", imgsz=SIDE, simplify=False, device="cpu")
    pictures = sorted((scenes.parent / "images" / "val").glob("*.png"))[:20]
    settings = {"imgsz": SIDE, "rect": False, "verbose": False, "device": "cpu"}
    found = 0
    for picture in pictures:
        ours, theirs = (
            YOLO(path, task="detect").predict(str(picture), **settings)[0].boxes
            for path in (trained, exported)
        )
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours.xyxy, theirs.xyxy, atol=0.05, rtol=1e-3)
        torch.testing.assert_close(ours.conf, theirs.conf, atol=1e-3, rtol=1e-3)
        found += len(ours)
    assert found >= len(pictures)


def test_a_distributed_worker_starts_from_the_injected_weights(start, settings, tmp_path):
    """The script that ultralytics writes for its workers, run by itself on the CPU."""
    from ultralytics.utils.dist import generate_ddp_file

    yolo = inject(YOLO(start))
    yolo.save(tmp_path / yolo.overrides["model"])
    yolo.overrides["model"] = str(tmp_path / yolo.overrides["model"])
    run = {**settings, "project": str(tmp_path), "name": "worker", "epochs": 1, "lr0": 1e-9}
    run |= {"warmup_epochs": 0, "model": yolo.overrides["model"]}
    trainer = yolo._smart_load("trainer")(overrides=run)
    trainer.model = trainer.get_model(weights=yolo.model, cfg=yolo.model.yaml)
    script = generate_ddp_file(trainer)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr
    made = YOLO(tmp_path / "worker" / "weights" / "last.pt").model
    assert sum(isinstance(m, EmaAttnRow) for m in made.modules()) == 3
    # A learning rate of nothing leaves the weights, up to half precision.
    before = dict(yolo.model.named_parameters())
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-3, rtol=1e-2)
