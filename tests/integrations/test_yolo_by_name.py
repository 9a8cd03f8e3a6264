"""``- [-1, 1, EmaAttn, [c2]]`` in a YOLO model YAML, with nothing but the package installed."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from support.yolo import ROW, save, ultralytics, with_rows, write_yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils.torch_utils import get_flops

from ema_timm.integrations.yolo import EmaAttnRow

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
NEWEST = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
FAMILIES = ["yolov8", "yolov5"] + (["yolo11", "yolo26"] if NEWEST else [])
SMALLEST = f"{FAMILIES[-1]}n.yaml"


def detector(config, **settings):
    return tasks.DetectionModel(copy.deepcopy(config), verbose=False, **settings)


def layers(model):
    return [m for m in model.modules() if isinstance(m, EmaAttnRow)]


def randomise(model):
    """Gates that differ from place to place, so that a lost layer or weight shows."""
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model):
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model


@pytest.fixture(scope="module")
def config():
    return with_rows(SMALLEST)


@pytest.fixture(scope="module")
def model_yaml(config, tmp_path_factory):
    return write_yaml(config, tmp_path_factory.mktemp("yolo") / SMALLEST.replace("n.", "n-ema."))


@pytest.fixture(scope="module")
def saved(model_yaml, tmp_path_factory):
    """A checkpoint as ultralytics saves it, in half precision, and what it answers."""
    yolo = YOLO(model_yaml)
    randomise(yolo.model)
    path = tmp_path_factory.mktemp("saved") / "ema.pt"
    save(yolo, path)
    x = torch.rand(1, 3, 96, 128)
    half = copy.deepcopy(yolo.model).half().float().eval()
    with torch.no_grad():
        torch.save((x, half(x)[0]), path.with_name("answer.pt"))
    return path


@pytest.mark.parametrize("scale", ["n", "s", "m", "l", "x"])
@pytest.mark.parametrize("family", FAMILIES)
def test_builds_at_every_scale_with_the_width_of_the_row_before(family, scale):
    with torch.device("meta"):  # stride is measured by a forward pass, which meta cannot answer
        built, _ = tasks.parse_model(with_rows(f"{family}{scale}.yaml"), 3, verbose=False)
    found = [(m.channels, m.groups) for m in built if isinstance(m, EmaAttnRow)]
    assert len(found) == 3
    assert [c for c, _ in found] == [branch[0].conv.in_channels for branch in built[-1].cv2]
    assert all(c % g == 0 and g <= 32 for c, g in found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolov8n-seg.yaml", tasks.SegmentationModel),
        ("yolov8n-pose.yaml", tasks.PoseModel),
        ("yolov8n-obb.yaml", tasks.OBBModel),
        ("yolov8n-cls.yaml", tasks.ClassificationModel),
        ("rtdetr-resnet50.yaml", tasks.RTDETRDetectionModel),
    ],
)
def test_builds_for_every_task(name, kind):
    model = kind(with_rows(name), verbose=False).eval()
    assert layers(model)
    with torch.no_grad():
        model(torch.rand(1, 3, 256, 256))


REMEDY = re.escape("Write [-1, 1, EmaAttn, []], or [-1, 1, EmaAttn, [8]] for 8 groups")


@pytest.mark.parametrize("repeats", [1, 6])  # 2 at this depth
@pytest.mark.parametrize(
    ("arguments", "groups", "gain"),
    [
        ([], 32, 1),
        (["c2"], 32, 1),
        ([64], 32, 1),  # the width, as pasted rows write it
        ([8], 8, 1),
        (["c2", 8], 8, 1),
        ([5], 4, 1),
        ([{"groups": 1000}], 64, 1),
        (["c2", {"groups": 8, "gain": 3}], 8, 3),
        ([8, {"gain": 2}], 8, 2),
        (["c2", 32, 2], 32, 2),  # written by ema-timm 0.2.0
    ],
    ids=str,
)
def test_a_row_takes_its_width_from_the_row_before(arguments, groups, gain, repeats):
    model = detector(with_rows("yolov8n.yaml", [-1, repeats, "EmaAttn", arguments], [15]))
    found = [(layer.channels, layer.groups, layer.gain) for layer in layers(model)]
    assert found == [(64, groups, gain)] * (1 if repeats == 1 else 2)


@pytest.mark.parametrize("scale", ["n", "s", "m", "l", "x"])
def test_rows_as_people_paste_them_build_at_every_scale(scale):
    config = with_rows(f"yolov8{scale}.yaml", [-1, 1, "EmaAttn", [8]], [4, 15])
    with torch.device("meta"):
        built, _ = tasks.parse_model(config, 3, verbose=False)
    rows = [(i, layer) for i, layer in enumerate(built) if isinstance(layer, EmaAttnRow)]
    assert [layer.groups for _, layer in rows] == [8, 8]
    assert [layer.channels for _, layer in rows] == [
        built[i - 1].cv2.conv.out_channels for i, _ in rows
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["wide"], [256], ["c2", 0], ["c2", "x"], [None], [True], ["c2", 8, 1, 1], ["c2", 8, "x"],
        ["c2", "c2"], ["c2", "c2", 8], ["c2", 8, 8], ["c2", 64], [256, 8], [8, {"groups": 8}],
        [{"gain": 0}], [{"gain": "x"}], [{"factor": 8}],
    ],
    ids=str,
)  # fmt: skip
def test_another_row_is_refused_and_shown_with_the_remedy(arguments):
    with pytest.raises(ValueError, match=rf"the number of groups.*{REMEDY}") as error:
        detector(with_rows("yolov8n.yaml", [-1, 1, "EmaAttn", arguments], [15]))
    shown = ", ".join(str(a).replace("c2", "64") for a in arguments)
    assert str(error.value).startswith(f"Row 16, [-1, 1, EmaAttn, [{shown}]], is not understood")
    assert "\n" not in str(error.value)


def test_a_row_that_reads_another_row_is_refused_and_shown_with_the_remedy():
    config = with_rows("yolov8n.yaml", ROW, [15])
    assert config["head"][6][2] == "EmaAttn"
    config["head"][6][0] = 15  # the row before, by its number
    assert [layer.channels for layer in layers(detector(config))] == [64]
    config["head"][6][0] = 6
    with pytest.raises(ValueError, match=rf"Row 16, .* reads row 6, .* must be -1\. {REMEDY}"):
        detector(config)


def test_another_map_gives_one_line_with_the_remedy():
    with pytest.raises(ValueError, match=rf"names 2\. {REMEDY}"):
        EmaAttnRow(64)([torch.rand(1, 64, 2, 2)] * 2)
    with pytest.raises(ValueError, match=rf"width 64 got a map of width 32\. {REMEDY}"):
        EmaAttnRow(64)(torch.rand(1, 32, 2, 2))


def test_in_python_the_width_comes_first():
    layer = EmaAttnRow(48, groups=8, gain=2)
    assert (layer.channels, layer.groups, layer.gain) == (48, 8, 2)
    with pytest.raises(ValueError, match=r"EmaAttnRow\(\) is not understood"):
        EmaAttnRow()

    def parse_model():  # another function of that name is no builder of YOLO
        return EmaAttnRow(16)

    assert parse_model().channels == 16


def test_a_process_that_imports_ultralytics_alone_knows_the_name(python, model_yaml):
    code = """
import sys
from ultralytics import YOLO
from ultralytics.nn import tasks
import ema_timm_autoload
assert "ema_timm" in sys.modules and "timm" not in sys.modules
print(type(YOLO(sys.argv[1]).model.model[-2]).__name__)
"""
    assert python(code, args=[model_yaml]).splitlines()[-1] == "EmaAttnRow"


def test_switched_off_an_import_is_enough(python, model_yaml):
    code = """
import sys
from ultralytics import YOLO
from ultralytics.nn import tasks
assert not hasattr(tasks, "EmaAttn")
import ema_timm
print(type(YOLO(sys.argv[1]).model.model[-2]).__name__)
"""
    out = python(code, args=[model_yaml], env={"EMA_TIMM_AUTOLOAD": "0"})
    assert out.splitlines()[-1] == "EmaAttnRow"


def test_the_yolo_command_knows_the_name(model_yaml, tmp_path):
    command = [sys.executable, "-c", "from ultralytics.cfg import entrypoint; entrypoint()"]
    settings = ["export", f"model={model_yaml}", "format=torchscript", "imgsz=64", "device=cpu"]
    done = subprocess.run(
        [*command, *settings], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.torchscript")) or list(model_yaml.parent.glob("*.torchscript"))


def test_fresh_distributed_workers_know_the_name(model_yaml, tmp_path):
    """What a training on several GPUs starts: new interpreters, no import of ours."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import pathlib, sys, torch\n"
        "from ultralytics.nn.tasks import DetectionModel\n"
        "torch.distributed.init_process_group('gloo')\n"
        "torch.set_num_threads(1)\n"
        "model = torch.nn.parallel.DistributedDataParallel(\n"
        "    DetectionModel(sys.argv[1], verbose=False), find_unused_parameters=True)\n"
        "out = model(torch.rand(2, 3, 64, 64))\n"
        "maps = out['one2many']['feats'] if 'one2many' in out else out\n"
        "maps = maps['feats'] if isinstance(maps, dict) else maps\n"
        "sum(m.float().pow(2).sum() for m in maps).backward()\n"
        "g = [p.grad for n, p in model.named_parameters() if 'gn.weight' in n]\n"
        "rank = torch.distributed.get_rank()\n"
        "pathlib.Path(__file__).with_name(str(rank)).write_text(str(\n"
        "    len(g) == 3 and all(bool(x.abs().sum() > 0) for x in g)))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", script, model_yaml], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


RELOAD = """
import sys, pathlib, torch
from ultralytics import YOLO
path = pathlib.Path(sys.argv[1])
x, want = torch.load(path.with_name("answer.pt"))
model = YOLO(path).model.float().eval()
with torch.no_grad():
    print(float((model(x)[0] - want).abs().max() / want.abs().max()))
"""


@pytest.mark.parametrize("safe", ["0", "1"])
def test_reloads_in_a_process_that_imported_nothing(python, saved, safe):
    env = {"ULTRALYTICS_SAFE_LOAD": safe, "OMP_NUM_THREADS": "1"}
    out = python(RELOAD, args=[saved], env=env)
    assert float(out.splitlines()[-1]) < 1e-5


def test_deepcopy_fuse_and_half_keep_the_function(config):
    model = randomise(detector(config)).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        want = model(x)[0]
        tolerance = 1e-5 * want.abs().max()
        assert (copy.deepcopy(model)(x)[0] - want).abs().max() <= tolerance
        fused = copy.deepcopy(model).fuse(verbose=False)
        assert len(layers(fused)) == 3
        assert (fused(x)[0] - want).abs().max() <= 20 * tolerance
        half = copy.deepcopy(model).half().float()
        assert (half(x)[0] - want).abs().max() <= 2e-2 * want.abs().max()


def test_weight_averaging_by_the_other_ema_averages_the_layer(config):
    from ultralytics.utils.torch_utils import ModelEMA

    model = detector(config)
    averaged = ModelEMA(model, decay=0.5, tau=1e-9)
    before = {n: p.clone() for n, p in averaged.ema.named_parameters() if "gn.weight" in n}
    assert len(before) == 3
    for layer in layers(model):
        nn.init.constant_(layer.gn.weight, 5.0)
    averaged.update(model)
    for name, parameter in averaged.ema.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, (before[name] + 5.0) / 2)


def test_a_class_of_the_users_own_wins_with_a_warning(python, tmp_path):
    code = """
import sys, warnings
import torch
from ultralytics.nn import tasks
import ema_timm_autoload
class EmaAttn(torch.nn.Identity):
    pass
tasks.EmaAttn = EmaAttn
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    ema_timm_autoload.install()
print(tasks.EmaAttn is EmaAttn, len(seen), str(seen[0].message))
"""
    out = python(code).splitlines()[-1]
    assert out.startswith("True 1 ultralytics.nn.tasks has its own EmaAttn")


def test_printed_gflops_hold_what_the_layer_computes():
    """At 640 pixels, by the whole formula of `ema_timm.backbones.complexity`."""
    maps = {0: (16, 16, 320), 2: (32, 32, 160), 4: (64, 32, 80)}  # row: C, G, H and W
    config = with_rows("yolov8n.yaml", [-1, 1, "EmaAttn", ["c2"]], maps)
    counted = 0
    for channels, groups, side in maps.values():
        n = channels // groups
        counted += groups * (2 * n * n * side + 10 * n * side * side + 9 * n * n)
    models = [tasks.DetectionModel(c, verbose=False) for c in ("yolov8n.yaml", config)]
    before, after = (get_flops(m, imgsz=640) for m in models)
    assert before == pytest.approx(8.7, abs=0.3)
    assert after - before == pytest.approx(2e-9 * counted, rel=0.01)
    assert models[1].info(verbose=True)[3] in (after, pytest.approx(after, rel=1e-3))


def test_torchscript_runs_where_the_package_is_not(python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ultralytics writes beside the YAML or here
    yolo = YOLO(write_yaml(with_rows("yolov8n.yaml"), tmp_path / "yolov8n-ema.yaml"))
    randomise(yolo.model)
    path = tmp_path / yolo.export(format="torchscript", imgsz=64, device="cpu", verbose=False)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = yolo.model.eval()(x)[0]
    torch.save((x, want), tmp_path / "answer.pt")
    code = """
import sys, torch
sys.modules["ema_timm"] = sys.modules["ultralytics"] = None
x, want = torch.load(sys.argv[2])
got = torch.jit.load(sys.argv[1])(x)
got = got[0] if isinstance(got, tuple) else got
print(float((got - want).abs().max() / want.abs().max()))
"""
    env = {"EMA_TIMM_AUTOLOAD": "0"}
    assert float(python(code, args=[path, tmp_path / "answer.pt"], env=env)) < 1e-4


def test_onnx_takes_other_sizes(tmp_path, monkeypatch):
    """Exported as ultralytics exports, with standard operators alone."""
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    yolo = YOLO(write_yaml(with_rows("yolov8n.yaml"), tmp_path / "yolov8n-ema.yaml"))
    randomise(yolo.model)
    # Their simplifier is a package of its own, which they would install.
    settings = {"format": "onnx", "imgsz": 64, "dynamic": True, "simplify": False, "device": "cpu"}
    path = os.fspath(tmp_path / yolo.export(**settings, opset=17, verbose=False))
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains == {""}  # standard operators alone
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((64, 64), (96, 160)):
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            want = yolo.model.eval()(x)[0]
        got = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


def test_predict_takes_the_layer(saved):
    image = (torch.rand(64, 80, 3) * 255).byte().numpy()
    (result,) = YOLO(saved).predict(image, imgsz=64, verbose=False, device="cpu")
    assert result.orig_shape == (64, 80)


CLONE = """
import torch
import torch.nn as nn

def parse_model(rows):
    ch, layers = [3], []
    for f, n, m, args in rows:
        m = eval(m) if isinstance(m, str) else m
        c2 = ch[-1]
        for j, a in enumerate(args):
            args[j] = eval(a) if isinstance(a, str) else a
        layers.append(m(*args))
        ch.append(args[1] if m is nn.Conv2d else ch[f])
    return nn.Sequential(*layers)
"""


@pytest.mark.parametrize("name", ["models", "yolov5.models"])
def test_yolov5_knows_the_name(python, tmp_path, name):
    """Its builder, in a clone and in the package, evaluates names in its own module."""
    folder = tmp_path.joinpath(*name.split("."))
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent):
        (parent / "__init__.py").touch()
    (folder / "yolo.py").write_text(CLONE)
    code = f"""
import torch
from {name}.yolo import parse_model
rows = [[-1, 1, "nn.Conv2d", [3, 48, 3]], *([-1, 1, "EmaAttn", a] for a in ([], ["c2"], [8]))]
print([(m.channels, m.groups) for m in parse_model(rows)[1:]])
"""
    assert python(code, env={"PYTHONPATH": str(tmp_path)}) == "[(48, 24), (48, 24), (48, 8)]\n"


def test_another_projects_module_of_that_name_is_left_alone(python, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "yolo.py").write_text("import torch\n")
    code = "import models.yolo as y; print(hasattr(y, 'EmaAttn'))"
    assert python(code, env={"PYTHONPATH": str(tmp_path)}) == "False\n"


def test_nothing_that_is_nondeterministic_or_cannot_be_exported_runs():
    """Adaptive pooling, say: its gradient on a GPU is neither, and ONNX wants fixed sizes of it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ran = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.add(str(function))
            return function(*args, **(kwargs or {}))

    layer = EmaAttnRow(64).train()
    x = torch.rand(2, 64, 9, 7, requires_grad=True)
    with Names():
        layer(x).square().sum().backward()
    assert ran
    doubtful = ("adaptive", "interpolate", "upsample", "scatter", "index_add", "index_put")
    assert not [name for name in ran if any(word in name for word in doubtful)]


def test_training_twice_from_one_seed_gives_the_same_gradients():
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            layer = EmaAttnRow(64)
            layer(torch.rand(2, 64, 9, 7)).square().sum().backward()
            found.append([p.grad for p in layer.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 3e4])
def test_mixed_precision_gives_no_nan(dtype, size):
    """Sums over a map of such values are past what float16 holds."""
    layer = EmaAttnRow(64, 8)
    x = (torch.randn(2, 64, 40, 40) * size / 4).clamp(-size, size).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    (out.float() / size).sum().backward()
    grads = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))


def test_rows_print_what_they_are(config):
    text = str(detector(with_rows("yolov8n.yaml", [-1, 1, "EmaAttn", [16, {"gain": 2}]])))
    assert len(re.findall(r"channels=64, groups=16, gain=2", text)) == 1
