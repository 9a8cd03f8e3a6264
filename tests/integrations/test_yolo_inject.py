"""EMA attention into a trained detector: it computes what it computed, and trains from there."""

import copy
import math

import pytest
import torch
import yaml
from support.yolo import save, trained_like, ultralytics, with_rows
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks

from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.integrations.yolo import EmaAttnRow, inject
from ema_timm.integrations.yolo.detector import trace_rows
from ema_timm.integrations.yolo.injection import injected, largest_difference
from ema_timm.integrations.yolo.rows import insert_rows, rows_of, yaml_text

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
NEWEST = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
SMALLEST = "yolo26n.yaml" if NEWEST else "yolov8n.yaml"
TASKS = ["yolov8n.yaml", "yolov8n-seg.yaml", "yolov8n-pose.yaml", "yolov8n-obb.yaml"]
TASKS += ["yolov8n-cls.yaml", "rtdetr-resnet50.yaml", "yolov5n.yaml", "yolov3-tiny.yaml"]
TASKS += ["yolo11n.yaml", "yolo26n.yaml", "yolo12n.yaml", "yolov10n.yaml"] if NEWEST else []


def opened(name):
    yolo = (RTDETR if "rtdetr" in name else YOLO)(name)
    trained_like(yolo.model)
    return yolo


class EnoughError(Exception):
    """Stops a forward pass before the last row, which in train mode may want labels."""


def training_maps(net):
    """What the last row is given in train mode; the network's statistics move."""
    given = []

    def keep(module, args):
        given.extend(args[0] if isinstance(args[0], list) else args)
        raise EnoughError

    hook = net.model[-1].register_forward_pre_hook(keep)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad(), pytest.raises(EnoughError):
        net.train()(torch.rand(2, 3, 256, 256, generator=generator))
    hook.remove()
    return given


def tensors(output):
    """Every tensor in what a network returns, which differs between versions."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts for t in tensors(part)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as ultralytics writes it, in half precision."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / SMALLEST.replace(".yaml", ".pt")
    save(opened(SMALLEST), path)
    return path


@pytest.mark.parametrize("name", TASKS)
def test_computes_what_it_computed_in_eval_and_train_mode(name):
    yolo = opened(name)
    plain = copy.deepcopy(yolo.model)
    done = injected(yolo, "head")
    assert done.carried == done.tensors == done.rebuilt == len(plain.state_dict())
    assert done.difference <= 1e-6
    assert sum(isinstance(m, EmaAttnRow) for m in yolo.model.modules()) == len(done.layers) > 0
    before, after = training_maps(plain), training_maps(yolo.model)
    assert min(float(m.std()) for m in before) > 1e-3  # the comparison compares something
    # Statistics of a batch of two amplify rounding.
    assert largest_difference(before, after) <= 1e-4
    assert largest_difference(trace_rows(plain)[0], trace_rows(yolo.model)[0]) <= 1e-4


@pytest.mark.parametrize("after", ["backbone", "neck", "all", [4, 6], [0]], ids=str)
def test_anywhere(after):
    yolo = opened("yolov8n.yaml")
    plain = copy.deepcopy(yolo.model).eval()
    done = injected(yolo, after)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(yolo.model.eval()(x)[0], plain(x)[0], rtol=1e-5, atol=1e-5)
    blocks = {"backbone": [2, 4, 6, 8], "neck": [12, 15, 18, 21]}
    blocks["all"] = blocks["backbone"] + blocks["neck"]
    wanted = blocks[after] if isinstance(after, str) else after
    found = [block.partition("(row ")[2] for _, block, _, _ in done.layers]
    assert found == [f"{row})" for row in wanted]


def test_the_head_default_is_behind_what_feeds_it():
    done = injected(opened("yolov8n.yaml"))
    assert [(row, channels) for row, _, channels, _ in done.layers] == [
        (16, 64),
        (20, 128),
        (24, 256),
    ]
    assert list(done.yolo.model.model[-1].f) == [16, 20, 24]


def test_a_gate_that_has_learned_is_no_identity():
    """The layers are not idle: what they hold reaches the output, and gets gradients."""
    yolo = inject(opened("yolov8n.yaml"))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = yolo.model.eval()(x)[0]
    yolo.model.train()
    sum(m.pow(2).sum() for m in tensors(yolo.model(x))).backward()
    for layer in (m for m in yolo.model.modules() if isinstance(m, EmaAttnRow)):
        assert float(layer.gn.weight.grad.abs().sum()) > 0
        assert float(layer.conv3x3.weight.grad.abs().sum()) > 0
        nn.init.constant_(layer.gn.bias.data, 1.0)
    with torch.no_grad():
        assert not torch.allclose(yolo.model.eval()(x)[0], before)


def test_the_half_checkpoint_computes_the_same_in_a_fresh_process(python, checkpoint, tmp_path):
    plain = YOLO(checkpoint)
    x = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        want = [m.clone() for m in trace_rows(plain.model)[0]]
    inject(YOLO(checkpoint), "all").save(tmp_path / "ema.pt")
    torch.save((x, want), tmp_path / "answer.pt")
    code = """
import sys, torch
from ultralytics import YOLO
net = YOLO(sys.argv[1]).model
_, want = torch.load(sys.argv[2])
from ema_timm.integrations.yolo.detector import trace_rows
from ema_timm.integrations.yolo.injection import largest_difference
print(largest_difference(want, trace_rows(net)[0]))
"""
    out = python(code, args=[tmp_path / "ema.pt", tmp_path / "answer.pt"])
    assert float(out.splitlines()[-1]) <= 2e-6


@pytest.mark.parametrize("channels", [64, 80, 96, 160, 192, 256, 384, 640, 768])
def test_the_start_survives_half_precision_at_every_width(channels):
    from ema_timm.integrations.yolo.injection import _layer

    layer = _layer(channels, 32, preserve=True)
    x = torch.randn(1, channels, 9, 7) * 10
    halved = copy.deepcopy(layer).half().float()
    with torch.no_grad():
        for m in (layer, halved):
            assert float((m(x) - x).abs().max() / x.abs().max()) <= 2e-6


def test_train_rebuilds_from_exactly_these_weights(checkpoint):
    """What `train()` does first: a network from the YAML, weights by name and shape."""
    yolo = inject(YOLO(checkpoint), "all")
    assert yolo.ckpt and yolo.ckpt.get("epoch") is None  # taken from memory, and no run resumed
    built = type(yolo.model)(copy.deepcopy(yolo.model.yaml), nc=80, verbose=False)
    built.load(yolo.model)
    ours, theirs = yolo.model.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_without_the_moved_names_most_of_the_weights_would_be_lost(checkpoint):
    """What the moving is for."""
    plain = YOLO(checkpoint).model.state_dict()
    built = tasks.DetectionModel(with_rows(SMALLEST, after=[2, 4]), verbose=False).state_dict()
    same = [n for n in plain if n in built and plain[n].shape == built[n].shape]
    assert len(same) < 0.7 * len(plain)


def test_every_reference_moves():
    """Absolute, backward and image references, on a graph small enough to follow by eye."""
    backbone = [[-1, 1, "A", []], [-1, 1, "B", []], [-2, 1, "C", []]]
    head = [[[-1, 0], 1, "D", []], [[1, -2, 3], 1, "E", []]]
    config = {"nc": 1, "backbone": backbone, "head": head}
    found = insert_rows(config, [0, 2], [-1, 1, "X", []])
    assert found.moved == (0, 2, 3, 5, 6)
    assert [[row[0], row[2]] for row in rows_of(found.config)] == [
        [-1, "A"],
        [-1, "X"],
        [-1, "B"],
        [-2, "C"],  # B's predecessor, which is X now
        [-1, "X"],
        [[-1, 1], "D"],  # 0 was A, whose output comes from X
        [[2, -2, 5], "E"],
    ]
    assert len(found.config["backbone"]) == 5
    assert rows_of(config)[2] == [-2, 1, "C", []]  # the source stays


def test_negative_references_of_rt_detr_move():
    config = with_rows("rtdetr-l.yaml", after=[12])
    moved = rows_of(config)
    assert moved[13][2] == "EmaAttn"
    plain = rows_of(tasks.yaml_model_load("rtdetr-l.yaml"))
    assert [row[2] for row in moved if row[2] != "EmaAttn"] == [row[2] for row in plain]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.model.fuse(verbose=False), "fused"),
        (lambda y: setattr(y.model.model[5], "f", 2), "not the 23 rows of its YAML"),
        (lambda y: y.model.yaml.pop("head"), "has the lists 'backbone' and 'head'"),
        (lambda y: inject(y), "has EMA attention already"),
    ],
)
def test_refuses_what_it_does_not_understand(change, message):
    yolo = opened("yolov8n.yaml")
    change(yolo)
    before = yolo.model
    with pytest.raises(UserError, match=message) as error:
        inject(yolo)
    assert "\n" not in str(error.value)
    assert yolo.model is before


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([22], "rows 0 to 21"),
        ([-1], "rows 0 to 21"),
        ("middle", "one of head, backbone, neck, all"),
        ([], "no block"),
    ],
)
def test_refuses_rows_that_are_none(after, message):
    with pytest.raises(UserError, match=message):
        inject(opened("yolov8n.yaml"), after)


@pytest.mark.skipif(not NEWEST, reason="the row kind with several maps came later")
def test_refuses_a_row_that_gives_several_maps():
    with pytest.raises(UserError, match="does not give one map"):
        inject(YOLO("yolov9e.yaml"), [10])


def test_refuses_an_exported_model():
    class Exported:
        model = "yolo11n.onnx"

    with pytest.raises(TypeError, match="holds a PyTorch network"):
        inject(Exported())


@pytest.mark.parametrize("found", ["8.1.47", "9.0.0"])
def test_another_version_gives_one_line(monkeypatch, found):
    monkeypatch.setattr("ema_timm.integrations.yolo.detector.version", lambda name: found)
    with pytest.raises(UserError, match=rf"needs ultralytics >= .*, and {found} is installed"):
        inject(None)


def test_without_ultralytics_one_line(python):
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ultralytics" else real(name, *rest)
from ema_timm.cli import main
print(main(["yolo", "yolo11n.pt", "--output", "x.pt"]))
"""
    done = python(code, check=False)
    assert done.stdout == "2\n"
    assert "pip install 'ema-timm[yolo]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_writes_both_files_and_reports(checkpoint, tmp_path, capsys):
    output = tmp_path / "made" / checkpoint.name.replace("n.", "n-ema.")
    assert main(["yolo", str(checkpoint), "--after", "all", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    plain, made = YOLO(checkpoint), YOLO(output)
    total = len(plain.model.state_dict())
    assert f"{total} of {total} tensors carried over, {total} of them known to train()" in text
    assert largest_difference(trace_rows(plain.model)[0], trace_rows(made.model)[0]) <= 2e-6
    described = YOLO(output.with_suffix(".yaml")).model
    assert described.state_dict().keys() == made.model.state_dict().keys()
    assert made.names == plain.names and made.task == plain.task


def test_the_command_writes_a_yaml_from_a_yaml(tmp_path, capsys):
    output = tmp_path / "yolov8s-ema.yaml"
    assert main(["yolo", "yolov8s.yaml", "--after", "4", "6", "--output", str(output)]) == 0
    assert "[-1, 1, EmaAttn, [{groups: 32}]]" in output.read_text()
    assert [m.gain for m in YOLO(output).model.modules() if isinstance(m, EmaAttnRow)] == [1, 1]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("yolov8n.yaml", "x.pt", "has no weights"),
        ("yolov8n.yaml", "x.onnx", "must end in .pt or .yaml"),
        ("yolov8n.onnx", "x.yaml", "must be a checkpoint"),
    ],
)
def test_the_command_refuses_in_one_line(source, output, message, tmp_path, capsys):
    assert main(["yolo", source, "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError])
def test_a_checkpoint_that_cannot_be_had_gives_one_line(error, monkeypatch, tmp_path, capsys):
    def fail(name):
        raise error("offline.")

    monkeypatch.setattr("ultralytics.YOLO", fail)
    assert main(["yolo", "yolo11n.pt", "--output", str(tmp_path / "x.pt")]) == 2
    said = capsys.readouterr().err
    assert "there is no yolo11n.pt" in said and "now: offline." in said and said.count("\n") == 1


def test_the_command_never_writes_over_its_source(checkpoint, capsys):
    before = checkpoint.read_bytes()
    assert main(["yolo", str(checkpoint), "--output", str(checkpoint)]) == 2
    assert "is the file" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("settings", [{}, {"nc": 2}, {"nc": 2, "activation": "nn.SiLU()"}], ids=str)
def test_a_yaml_with_no_scales_can_be_read_again(settings):
    rows = {"backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    assert yaml.safe_load(yaml_text({**settings, **rows})) == {**settings, **rows}


@pytest.mark.parametrize("name", ["detector.yaml", "yolov8s-ema.yaml"])
def test_the_yaml_keeps_its_scale_where_the_name_gives_none(name, tmp_path):
    path = tmp_path / name
    path.write_text(yaml_text(with_rows("yolov8m.yaml")))
    width = YOLO(path).model.model[0].conv.out_channels
    assert width == (32 if "8s" in name else 48)
    assert math.isfinite(float(trace_rows(YOLO(path).model)[0][0].sum()))
