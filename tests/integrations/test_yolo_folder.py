"""A detector as safetensors, YAML and description: rebuilt exactly, and nothing of it is run."""

import json
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.yolo import save, ultralytics
from torch import nn
from ultralytics import RTDETR, YOLO

from ema_timm.errors import UserError
from ema_timm.integrations.yolo import EmaAttnRow, inject, load, save_folder
from ema_timm.integrations.yolo.detector import trace_rows

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
NEWEST = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
NAMES = ["yolov8s.yaml", "yolov8n-seg.yaml", "yolov8n-pose.yaml", "rtdetr-resnet50.yaml"]
NAMES += ["yolo26n.yaml"] if NEWEST else []


@pytest.fixture
def folder(tmp_path):
    yolo = inject(YOLO("yolov8n.yaml"))
    yolo.model.names = {number: f"class {number}" for number in range(80)}
    save_folder(yolo, tmp_path / "detector")
    return tmp_path / "detector"


@pytest.mark.parametrize("name", NAMES)
def test_rebuilds_the_detector_exactly(name, tmp_path):
    yolo = inject((RTDETR if "rtdetr" in name else YOLO)(name))
    for layer in (m for m in yolo.model.modules() if isinstance(m, EmaAttnRow)):
        nn.init.normal_(layer.gn.weight)
    files = save_folder(yolo, tmp_path / "detector")
    assert {file.name for file in files} == {"model.safetensors", "model.yaml", "detector.json"}
    again = load(tmp_path / "detector")
    assert type(again) is type(yolo) and again.task == yolo.task
    assert again.model.names == yolo.model.names
    for a, b in zip(trace_rows(yolo.model)[0], trace_rows(again.model)[0], strict=True):
        assert torch.equal(a, b)
    assert again.ckpt["model"] is again.model  # train() starts from these weights


def test_a_checkpoint_in_half_precision_stays_small(tmp_path):
    save(YOLO("yolov8n.yaml"), tmp_path / "plain.pt")
    yolo = YOLO(tmp_path / "plain.pt")
    save_folder(yolo, tmp_path / "detector")
    types = {t.dtype for t in load_file(tmp_path / "detector" / "model.safetensors").values()}
    assert torch.float32 not in types


def changed_yaml(change):
    def apply(folder):
        file = folder / "model.yaml"
        config = yaml.safe_load(file.read_text())
        change(config)
        file.write_text(yaml.safe_dump(config))

    return apply


def changed_weights(change):
    def apply(folder):
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return apply


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def changed_description(key, value):
    def apply(folder):
        file = folder / "detector.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return apply


FIRST = "model.0.conv.weight"
FAULTS = {
    "a function as a row": (
        changed_yaml(lambda c: c["head"][0].__setitem__(2, "torch_safe_load")),
        "names 'torch_safe_load', which is not a layer",
    ),
    "a module as a row": (
        changed_yaml(lambda c: c["head"][0].__setitem__(2, "contextlib")),
        "which is not a layer",
    ),
    "a function of torch.nn": (
        changed_yaml(lambda c: c["head"][0].__setitem__(2, "nn.factory_kwargs")),
        "which is not a layer",
    ),
    "a network as a row, which would read another YAML": (
        changed_yaml(
            lambda c: c["head"].__setitem__(0, [-1, 1, "DetectionModel", ["'http://x/y'"]])
        ),
        "names 'DetectionModel', which is not a layer",
    ),
    "a layer a billion times": (
        changed_yaml(lambda c: c["head"][1].__setitem__(1, 10**9)),
        "must repeat its layer 1 to 100 times, got 1000000000",
    ),
    "a layer that is too wide for any memory": (
        changed_yaml(lambda c: c["backbone"][0].__setitem__(3, [2**20, 3, 2])),
        "tensors differ, first",
    ),
    "a row with arguments of another layer": (
        changed_yaml(lambda c: c["backbone"][0].__setitem__(3, ["x", {}])),
        "does not build with",
    ),
    "an expression as an argument": (
        changed_yaml(lambda c: c["backbone"][0].__setitem__(3, ["__import__('os').getcwd()"])),
        "does not build with",
    ),
    "a part that stands for billions": (
        lambda f: (f / "model.yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        "does not describe a detector",
    ),
    "a YAML as deep as it is long": (
        lambda f: (f / "model.yaml").write_text("[" * 10**5),
        "does not describe a detector",
    ),
    "a YAML of many megabytes": (
        lambda f: (f / "model.yaml").write_text("#" * 2**21),
        "damaged",
    ),
    "a header longer than any network's": (
        lambda f: (f / "model.safetensors").write_bytes(
            struct.pack("<Q", 5 * 2**20) + b" " * (5 * 2**20)
        ),
        "has a header of 5,242,880 bytes",
    ),
    "an activation that runs code": (
        changed_yaml(lambda c: c.__setitem__("activation", "__import__('os').getcwd()")),
        "activation must be like",
    ),
    "an activation that hides a call": (
        changed_yaml(lambda c: c.__setitem__("activation", "nn.SiLU(print())")),
        "activation must be like",
    ),
    "no rows": (changed_yaml(lambda c: c.pop("head")), "has the lists"),
    "a tag that runs code": (
        lambda f: (f / "model.yaml").write_text("!!python/object/apply:os.getcwd []"),
        "damaged",
    ),
    "a YAML that is none": (
        lambda f: (f / "model.yaml").write_text("- 1"),
        "not describe a detector",
    ),
    "cut weights": (cut, "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "missing"),
    "a tensor less": (changed_weights(lambda w: w.pop(FIRST)), f"first {FIRST}"),
    "another shape": (
        changed_weights(lambda w: w.__setitem__(FIRST, torch.zeros(1))),
        f"first {FIRST}",
    ),
    "NaN": (
        changed_weights(lambda w: w.__setitem__(FIRST, w[FIRST] * float("nan"))),
        "NaN",
    ),
    "no description": (lambda f: (f / "detector.json").unlink(), "missing"),
    "a description as deep as it is long": (
        lambda f: (f / "detector.json").write_text("[" * 10**5),
        "damaged",
    ),
    "no licence": (changed_description("license", None), "not describe a detector"),
    "a size that is none": (changed_description("imgsz", -1), "not describe a detector"),
    "another kind of object": (
        changed_description("decoder", "os.system"),
        "not describe a detector",
    ),
    "names that are no numbers": (changed_description("names", {"x": "a"}), "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses_in_one_line(folder, fault):
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_nowhere_gives_one_line(monkeypatch):
    with pytest.raises(UserError, match="neither a folder nor on the Hub") as error:
        load("not a name/at all")
    assert "\n" not in str(error.value)


def test_loading_warns_of_nothing(folder, caplog):
    """The scale that ultralytics assumes is the network's own."""
    caplog.set_level("WARNING", "ultralytics")
    ultralytics.utils.LOGGER.propagate, before = True, ultralytics.utils.LOGGER.propagate
    try:
        load(folder)
    finally:
        ultralytics.utils.LOGGER.propagate = before
    assert not caplog.records


def test_a_checkpoint_gives_one_line_with_the_remedy(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"?")
    with pytest.raises(UserError, match=r"ema-timm yolo .*best\.pt --folder DIR"):
        load(tmp_path / "best.pt")


def test_refuses_a_fused_network(tmp_path):
    yolo = YOLO("yolov8n.yaml")
    yolo.model.fuse(verbose=False)
    with pytest.raises(UserError, match="fused"):
        save_folder(yolo, tmp_path)


def test_the_loaded_detector_predicts(folder):
    yolo = load(folder)
    image = (torch.rand(64, 64, 3) * 255).byte().numpy()
    (result,) = yolo.predict(image, imgsz=64, verbose=False, device="cpu")
    assert result.names[3] == "class 3"
