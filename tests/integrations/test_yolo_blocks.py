"""EMA attention inside the blocks of YOLO: it starts as the identity and is never lost."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import yaml
from support.digit_scenes import SIDE, write_scenes
from support.yolo import save, trained_like, ultralytics, write_yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from ema_timm import EmaAttn
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.integrations.yolo import all_but_attention, inject, load, save_folder
from ema_timm.integrations.yolo.card import detector_card_text
from ema_timm.integrations.yolo.contents import read_description
from ema_timm.integrations.yolo.detector import ema_layers, trace_rows
from ema_timm.integrations.yolo.injection import injected
from ema_timm.integrations.yolo.results import known_facts
from ema_timm.integrations.yolo.rows import rows_of

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
NEWEST = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
BLOCKS = {"yolov5n": ["C3"], "yolov8n": ["C2f"]}
if NEWEST:
    BLOCKS |= {"yolov9t": ["RepCSP"], "yolov10n": ["C2f", "C2fCIB"]}
    BLOCKS |= {"yolo11n": ["C3k2"], "yolo12n": ["A2C2f", "C3k2"], "yolo26n": ["C3k2"]}
DEFAULT = ("yolov8n", "yolo12n")  # the others take minutes

TINY = {
    "nc": 1,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 2, "C2f", [32, True]],
        [-1, 1, "C3", [32]],
    ],
    "head": [[[3], 1, "Detect", ["nc"]]],
}


def with_inside(config, arguments):
    """A row `EmaAttnInside` before the last one, which here reads the row before."""
    config = copy.deepcopy(config)
    config["head"].insert(-1, [-1, 1, "EmaAttnInside", arguments])
    return config


def placed(rows):
    return [name for name, m in nn.ModuleList(rows).named_modules() if isinstance(m, EmaAttn)]


def built(name, classes):
    """Names of the layers in a network of ultralytics, without its weights."""
    with torch.device("meta"):
        config = {"nc": 80, **with_inside(tasks.yaml_model_load(f"{name}.yaml"), classes)}
        return placed(tasks.parse_model(config, 3, verbose=False)[0])


def shake(net):
    """Gates that differ from place to place, so that a lost layer or weight shows."""
    generator = torch.Generator().manual_seed(1)
    for _, _, layer in ema_layers(net):
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return net


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(trace_rows(a)[0], trace_rows(b)[0], strict=True))


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint as ultralytics writes it, in half precision."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    yolo = YOLO(path)
    trained_like(yolo.model)
    save(yolo, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.long) for n in BLOCKS],
)
def test_keeps_the_outputs_and_every_weight_and_runs_once(name):
    yolo = YOLO(f"{name}.yaml")
    plain = copy.deepcopy(trained_like(yolo.model))
    done = injected(yolo, inside=BLOCKS[name])
    assert done.difference == 0
    assert done.carried == done.tensors == done.rebuilt == len(plain.state_dict())
    assert {block.rpartition(" ")[2] for _, block, _, _ in done.layers} <= {
        row[2] for row in rows_of(plain.yaml)
    }
    layers = [layer for _, _, layer in ema_layers(yolo.model)]
    assert len(layers) == len(done.layers) > 3
    ran = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    trace_rows(shake(yolo.model))
    assert len(ran) == len(set(ran)) == len(layers)
    assert not same(plain, yolo.model)


@pytest.mark.skipif(not NEWEST, reason="later networks")
@pytest.mark.parametrize(
    ("name", "classes", "row", "wanted"),
    [
        ("yolo11m", ["C3k2"], 2, ["m.0"]),  # m holds a C3k, whose own m is another's
        ("yolo11m", ["C3k"], 2, ["m.0.m.0", "m.0.m.1"]),
        ("yolo11m", ["C3k2", "C3k"], 2, ["m.0", "m.0.m.0", "m.0.m.1"]),
        ("yolo11m", ["C3k2"], 10, []),  # C2PSA has an m, too
        ("yolo11m", ["C2PSA"], 10, ["m.0"]),
        ("yolo11m", ["C2PSA", {"groups": 8}], 2, []),
        ("yolov8s", ["C2f"], 4, ["m.0", "m.1"]),
        ("yolo12n", ["A2C2f"], 6, ["m.0.1", "m.1.1"]),  # of a Sequential, the last
    ],
    ids=str,
)
def test_goes_by_the_class_of_the_block(name, classes, row, wanted):
    found = [each for each in built(name, classes) if each.startswith(f"{row}.")]
    assert sorted(found) == sorted(f"{row}.{each}.ema" for each in wanted)


@pytest.mark.parametrize("scale", "nsmlx")
def test_builds_at_every_scale(scale):
    assert len(built(f"yolov8{scale}", ["C2f"])) == {"n": 10, "s": 10}.get(scale) or 18


def test_fuse_keeps_the_layers_and_the_outputs(tiny):
    yolo = inject(YOLO(tiny), inside=["C2f", "C3"])
    net = shake(yolo.model).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)[0]
        net.fuse(verbose=False)
        torch.testing.assert_close(net(x)[0], before, rtol=1e-4, atol=1e-3)
    assert len(list(ema_layers(net))) == 3


FRESH = """
import sys, torch
from ultralytics import YOLO
net = YOLO(sys.argv[1]).model
print("timm" in sys.modules)
from ema_timm.integrations.yolo.detector import trace_rows
torch.save(trace_rows(net)[0], sys.argv[2])
"""


@pytest.mark.parametrize("safe", ["0", "1"])
def test_reloads_in_a_process_that_imported_nothing(python, tiny, tmp_path, safe):
    yolo = inject(YOLO(tiny), inside=["C2f"])
    shake(yolo.model).half().float()
    save(yolo, tmp_path / "ema.pt")
    args = [tmp_path / "ema.pt", tmp_path / "maps.pt"]
    assert python(FRESH, args=args, env={"ULTRALYTICS_SAFE_LOAD": safe}).endswith("False\n")
    for ours, theirs in zip(trace_rows(yolo.model)[0], torch.load(args[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_command_writes_a_checkpoint_and_a_yaml_that_builds_it(tiny, tmp_path, capsys):
    output = tmp_path / "ema.pt"
    command = ["yolo", str(tiny), "--inside", "C2f", "C3", "--groups", "8"]
    assert main([*command, "--output", str(output)]) == 0
    assert "row 2: EMA attention after m.1 of C2f, 16 channels in 8 groups" in (
        capsys.readouterr().out
    )
    assert same(YOLO(tiny).model, YOLO(output).model)
    described = YOLO(output.with_suffix(".yaml")).model
    assert described.state_dict().keys() == YOLO(output).model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inside", "C3k2"], "has a block C3k2 with elements in m. There are C2f, C3."),
        (["--inside", "Conv"], "has a block Conv"),
        (["--inside", "C3", "--after", "head"], "exclude each other"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(options, message, tiny, tmp_path, capsys):
    assert main(["yolo", str(tiny), *options, "--output", str(tmp_path / "x.pt")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.pt").exists()


def test_a_second_layer_at_a_place_is_refused_and_others_are_added(tiny):
    yolo = inject(YOLO(tiny), inside="C2f")
    before = yolo.model
    with pytest.raises(UserError, match=r"row 2, C2f: .* has EMA attention already"):
        inject(yolo, inside="C2f")
    assert yolo.model is before
    inject(inject(yolo, inside="C3"), "head")
    assert [row for row, _, _ in ema_layers(yolo.model)] == [2, 2, 3, 6]
    assert len(placed(type(yolo.model)(copy.deepcopy(yolo.model.yaml), verbose=False).model)) == 4


@pytest.mark.parametrize(
    "arguments",
    [[], [8], ["C2f", 8], ["C2f", {"gain": 3}], ["C2f", {"groups": 0}], ["C2f", {"factor": 8}]],
    ids=str,
)
def test_a_row_that_is_not_understood_is_shown_with_the_remedy(arguments):
    with pytest.raises(ValueError, match=r"is not understood: .*Write \[-1, 1, EmaAttnInside, "):
        tasks.DetectionModel(with_inside(TINY, arguments), verbose=False)


def test_a_row_by_hand_is_the_papers_layer_and_one_by_the_command_the_identity():
    for arguments, gain in [(["C2f"], 1), (["C2f", {"gain": 2}], 2)]:
        net = tasks.DetectionModel(with_inside(TINY, arguments), verbose=False)
        assert net.model[-2].gain == gain
        for _, _, layer in ema_layers(net):
            assert bool(layer.gn.weight.any()) == (gain == 1)


def test_repeated_rows_and_blocks_are_in_the_results_and_on_the_card(tmp_path):
    config = with_inside(TINY, ["C3"])
    config["backbone"].append([-1, 2, "EmaAttn", [8]])
    config["head"][-1][0] = [5]
    yolo = YOLO(write_yaml(config, tmp_path / "rows.yaml"))
    save_folder(yolo, tmp_path / "made")
    made = tmp_path / "made"
    facts = json.loads(json.dumps(known_facts(made, read_description(made), load(made))))
    assert facts["layers"] == [
        {"row": 3, "module": "m.0.ema", "channels": 16, "groups": 16},
        {"row": 4, "module": "0", "channels": 32, "groups": 8},
        {"row": 4, "module": "1", "channels": 32, "groups": 8},
    ]
    card = detector_card_text({**facts, "format": 1})
    assert "3 (rows 3, 4)" in card and "ema-attention" in card


def test_gflops_count_the_layers():
    before, after = (
        ultralytics.utils.torch_utils.get_flops(tasks.DetectionModel(config, verbose=False), 640)
        for config in (copy.deepcopy(TINY), with_inside(TINY, ["C2f", "C3"]))
    )
    assert after - before == pytest.approx(2e-9 * 3 * 10 * 16 * 160 * 160, rel=0.02)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("set"), {"train": 4, "val": 2})


@pytest.fixture
def settings(scenes, tmp_path):
    quiet = {"plots": False, "verbose": False, "workers": 0, "device": "cpu", "amp": False}
    size = {"data": str(scenes), "imgsz": SIDE, "batch": 2, "mosaic": 0.0, "lr0": 0.01}
    return {**quiet, **size, "project": str(tmp_path / "runs"), "name": "run", "exist_ok": True}


class StoppedError(Exception):
    """Ends a training after its first checkpoint."""


def stop(trainer):
    raise StoppedError


def test_training_resuming_validation_and_export_keep_the_layers(
    tiny, settings, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    inject(YOLO(tiny), inside=["C2f", "C3"]).save(tmp_path / "ema.pt")
    yolo = YOLO(tmp_path / "ema.pt")
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(StoppedError):
        yolo.train(**settings, epochs=2)
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    resumed = YOLO(last)
    resumed.train(resume=True)
    assert resumed.trainer.start_epoch == 1
    made = YOLO(last)
    layers = [layer for _, _, layer in ema_layers(made.model)]
    assert len(layers) == 3
    assert all(float(layer.gn.bias.detach().abs().max()) > 0 for layer in layers)
    quiet = {"device": "cpu", "imgsz": SIDE, "verbose": False}
    made.val(data=settings["data"], plots=False, project=str(tmp_path), workers=0, **quiet)
    exported = torch.jit.load(YOLO(last).export(format="torchscript", **quiet))
    image = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        want = YOLO(last).model.float().eval()(image)[0]
        torch.testing.assert_close(exported(image), want, rtol=1e-3, atol=1e-3)


def test_freezing_all_but_the_attention_trains_only_the_layers(tiny, settings, tmp_path):
    yolo = inject(inject(YOLO(tiny), inside="C2f"), [3])
    frozen = all_but_attention(yolo)
    assert [0, 1, 3] == [each for each in frozen if isinstance(each, int)][:3]
    before = {name: t.clone() for name, t in yolo.model.state_dict().items()}
    yolo.train(**settings, epochs=2, warmup_epochs=0, freeze=frozen)
    after = YOLO(tmp_path / "runs" / "run" / "weights" / "last.pt").model.state_dict()
    rows = {f"model.{row}.{name}" for row, name, _ in ema_layers(yolo.model)}
    changed = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert changed and all(name.startswith(tuple(rows)) for name in changed)
    assert {row for row in rows if any(n.startswith(row) for n in changed)} == rows


def test_freezing_needs_attention(tiny):
    with pytest.raises(UserError, match="has no EMA attention"):
        all_but_attention(YOLO(tiny))


def test_fresh_workers_of_several_gpus_build_the_layers(tiny, tmp_path):
    """What such a training starts: new interpreters that import ultralytics alone."""
    save(inject(YOLO(tiny), inside="C2f"), tmp_path / "ema.pt")
    code = (
        "import sys\nfrom ultralytics.nn.tasks import DetectionModel, load_checkpoint\n"
        if NEWEST
        else "import sys\nfrom ultralytics.nn.tasks import DetectionModel, attempt_load_one_weight"
        " as load_checkpoint\n"
    )
    code += (
        "net = load_checkpoint(sys.argv[1])[0]\n"
        "new = DetectionModel(net.yaml, verbose=False)\nnew.load(net)\n"
        "print(sum(n.endswith('.ema') for n, _ in new.named_modules()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "ema.pt"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["2"], done.stderr


def test_attend_draws_a_detector(tiny, scenes, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    inject(inject(YOLO(tiny), inside="C2f"), [3]).save(tmp_path / "ema.pt")
    yolo = YOLO(tmp_path / "ema.pt")
    save_folder(yolo, tmp_path / "made")
    pictures = [str(each) for each in sorted((scenes.parent / "images" / "val").glob("*.png"))]
    for source in ("ema.pt", "made"):
        output = tmp_path / f"{source}.png"
        command = ["attend", str(tmp_path / source), *pictures, "--output", str(output)]
        assert main(command) == 0
        said = capsys.readouterr()
        # Layers on maps of one size are one stage.
        assert said.err.splitlines()[-1] == f"{output}: model.4"
        assert [line.split("\t")[0] for line in said.out.splitlines()[-2:]] == pictures
        assert output.stat().st_size > 1000
    assert main([*command, "--target", "0"]) == 2
    assert "--target is about Grad-CAM, which is not drawn for detectors" in capsys.readouterr().err


def test_attend_sees_the_maps_that_the_detector_computes(tiny, scenes):
    from ema_timm.see.detectors import letterboxed
    from ema_timm.see.gates import attention_maps

    yolo = inject(YOLO(tiny), inside="C2f")
    shake(yolo.model)
    yolo.overrides["imgsz"] = 96
    picture = next((scenes.parent / "images" / "val").glob("*.png"))
    images = letterboxed(yolo, [picture])
    assert images.shape == (1, 3, 96, 96) and 0 <= images.min() < images.max() <= 1
    found, name = attention_maps(yolo.model, images), "model.2.m.1.ema"
    kept = {}
    yolo.model.get_submodule(name).register_forward_hook(
        lambda layer, inputs, output: kept.update(x=inputs[0], y=output)
    )
    with torch.no_grad():
        yolo.model.eval()(images)
    maps = found[name]
    gates = maps.repeat_interleave(kept["x"].shape[1] // maps.shape[1], dim=1)
    torch.testing.assert_close(kept["x"] * gates, kept["y"])
