"""Exported files: verified before they are named, and the same network where they are used."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from support.networks import shake
from timm.utils import reparameterize_model
from torch import nn

import ema_timm
from ema_timm import errors
from ema_timm.attention import EmaAttn
from ema_timm.cli import main
from ema_timm.errors import UserError, VerificationError
from ema_timm.export import write as export_module
from ema_timm.export.formats import FORMATS, open_onnx, write_onnx
from ema_timm.export.inputs import FREE_AXES, InputSize
from ema_timm.export.int8 import quantize_int8
from ema_timm.export.layers import ready_to_export
from ema_timm.export.write import export
from ema_timm.ops.export.dialects import ExportedEma

REPO = os.environ.get("TIMM_REPO")
# PyTorch's exporters warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = [(1, 3, 64, 64), (4, 3, 41, 96), (2, 3, 80, 33)]
TOLERANCE = 1e-4  # relative to the largest output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint folder as a run leaves it: a tiny network with EMA in its last stage."""
    folder = tmp_path_factory.mktemp("saved")
    model = network("test_resnet_ema", ema_stages=(4,), num_classes=4)
    arguments = {"ema_stages": [4]}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def network(name, **kwargs):
    model = shake(timm.create_model(name, **kwargs)).eval()
    for layer in model.modules():
        if isinstance(layer, EmaAttn):
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same(run, model, sizes=SIZES):
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(size)
            want = model(x)
            assert (run(x) - want).abs().max() < TOLERANCE * want.abs().max(), size


def nodes_per_layer(path, plain, layers):
    """Operators that a layer adds, from the graphs of both networks."""
    import onnx

    counts = [
        sum(node.op_type != "Constant" for node in onnx.load(file).graph.node)
        for file in (path, plain)
    ]
    return (counts[0] - counts[1]) / layers


# Operators that a layer may add, by exporter.
AT_MOST = {
    "free": {"legacy": 54, "dynamo": 60},
    "free batch": {"legacy": 30, "dynamo": 30},
    "fixed": {"legacy": 30, "dynamo": 30},
}


@pytest.mark.parametrize(
    ("sizes", "free"), [("free", FREE_AXES), ("free batch", {0: "batch"}), ("fixed", {})]
)
@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
def test_a_layer_is_few_operators(exporter, sizes, free, tmp_path):
    plain = shake(timm.create_model("test_resnet", num_classes=4)).eval()
    model = network("test_resnet_ema", ema_stages=(3, 4), num_classes=4)
    x = torch.randn(2, 3, 64, 96)
    ready = ready_to_export(model, "onnx", None if free == FREE_AXES else x)
    for net, name in ((ready, "ema"), (plain, "plain")):
        write_onnx(net, x, tmp_path / f"{name}.onnx", exporter, free)
    added = nodes_per_layer(tmp_path / "ema.onnx", tmp_path / "plain.onnx", 2)
    assert added <= AT_MOST[sizes][exporter]
    tried = {3: SIZES, 1: [(1, 3, 64, 96), (5, 3, 64, 96)], 0: [(2, 3, 64, 96)]}
    assert_same(open_onnx(tmp_path / "ema.onnx"), model, tried[len(free)])


@pytest.mark.parametrize("way", ["script", "trace", "program"])
@pytest.mark.parametrize("small", [False, True])
def test_what_pytorch_runs_takes_the_smallest_maps_and_gives_gradients(way, small):
    """It writes over maps of its own: never over the input, nor what a backward needs."""
    layer = network("test_resnet_ema", num_classes=4).layer1[0].se
    n, auto = layer.channels, torch.export.Dim.AUTO
    example = torch.randn(2, n, 4, 6)
    ready = ready_to_export(nn.Sequential(layer).eval(), "pytorch", example if small else None)
    free = ({0: auto} if small else {0: auto, 2: auto, 3: auto},)
    run = {
        "script": lambda: torch.jit.script(ready),
        "trace": lambda: torch.jit.trace(ready, example, check_trace=False),
        "program": lambda: torch.export.export(ready, (example,), dynamic_shapes=free).module(),
    }[way]()
    for size in [(4, 6)] if small else [(4, 6), (1, 1), (2, 2), (2, 7), (9, 1)]:
        want = torch.randn(3, n, *size, requires_grad=True)
        found = want.detach().clone().requires_grad_()
        out, expected = run(found), layer(want)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
        weights = torch.randn_like(out)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(found.grad, want.grad, rtol=1e-3, atol=1e-4)


# Those that XNNPACK's delegate takes; a mean along one axis, a selection, a product of a vector or
# an expansion would cut the network in two.
DELEGATED = {
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "sigmoid.default", "rsqrt.default"),
    *("avg_pool2d.default", "convolution.default", "addmm.default", "mm.default"),
    *("bmm.default", "cat.default", "slice.Tensor", "view.default", "permute.default"),
    *("_softmax.default", "clone.default", "alias.default"),
}


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 7), (14, 14)])
def test_a_delegate_gets_the_same_function_in_operators_that_it_takes(size):
    layer = network("test_resnet_ema", num_classes=4).layer1[0].se
    x = torch.randn(2, layer.channels, *size)
    ready = ready_to_export(nn.Sequential(layer).eval(), "delegate")
    torch.testing.assert_close(ready(x), layer(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(ready, (x,)).run_decompositions()
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    assert {str(node.target).removeprefix("aten.") for node in called} <= DELEGATED


@pytest.mark.parametrize("format", ["onnx", "torchscript", "pt2"])
def test_a_fixed_size_is_taken_and_verified(folder, format):
    done = export(folder, format, exporter="legacy", fixed=InputSize((48, 64)))
    assert done.sizes == [(1, 3, 48, 64), (3, 3, 48, 64), (2, 3, 48, 64)]
    assert done.difference < TOLERANCE
    assert_same(FORMATS[format].open(done.path), load(folder), [(4, 3, 48, 64)])


def test_a_size_that_cannot_be_free_is_said_with_the_remedy(tmp_path, capsys):
    """The last maps of 32 pixels are single ones, which torch.export tells from all others."""
    model = network("test_resnet_ema", num_classes=4)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    command = ["export", str(tmp_path), "--format", "pt2"]
    assert main(command) == 1
    assert "--img-size" in capsys.readouterr().err
    assert main([*command, "--img-size", "32"]) == 0


def test_onnx_leaves_the_size_free_if_maps_of_groups_of_one_channel_may_be_one_pixel(tmp_path):
    """PyTorch's exporter then fails on convolutions, so these files get the plain dialect."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1),
        EmaAttn(8, groups=8),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        EmaAttn(8, groups=4),
    ).eval()
    write_onnx(ready_to_export(model, "onnx"), torch.randn(2, 3, 8, 10), tmp_path / "m.onnx")
    assert_same(
        open_onnx(tmp_path / "m.onnx"), model, [(1, 3, 8, 8), (3, 3, 16, 8), (2, 3, 40, 33)]
    )


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
def test_the_reference_is_exported_too(exporter, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), EmaAttn(8, groups=2)).eval()
    ema_timm.set_implementation(model, "reference")
    write_onnx(model, torch.randn(2, 3, 9, 12), tmp_path / "m.onnx", exporter)
    assert_same(open_onnx(tmp_path / "m.onnx"), model, [(1, 3, 9, 12), (3, 3, 16, 8)])


def test_a_fixed_batch_and_int8_of_a_fixed_size(folder, capsys):
    command = ["export", str(folder), "--format", "onnx", "--exporter", "legacy"]
    assert main([*command, "--img-size", "64", "--batch-size", "1", "--int8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "at 1x3x64x64, 1x3x64x64, 1x3x64x64 to" in first
    assert "of 32 random images" in second
    with pytest.raises(Exception, match=r"[Ii]nvalid|INVALID"):
        open_onnx(folder / "model.onnx")(torch.randn(2, 3, 64, 64))


def test_an_onnx_file_has_the_preprocessing_and_the_labels(folder):
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = ["oak", "elm", "fir", "yew"]
    (folder / "config.json").write_text(json.dumps(config))
    done = export(folder, "onnx", exporter="legacy", fixed=InputSize((48, 64)))
    for path in (done.path, quantize_int8(folder, InputSize((48, 64))).path):
        known = {k: json.loads(v) for k, v in open_onnx(path).metadata.items() if "onnx" not in k}
        assert known["architecture"] == "test_resnet_ema"
        assert known["label_names"] == config["label_names"]
        assert known["input_size"] == [3, 48, 64]
        for key in ("mean", "std", "interpolation", "crop_pct"):
            assert known[key] == config["pretrained_cfg"][key]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--img-size", "1", "2", "3"], "--img-size must be one number of pixels or two"),
        (["--img-size", "0"], "--img-size must be one number of pixels or two"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["--batch-size", "2", "--int8"],
            "--int8 compares one image at a time, got --batch-size 2",
        ),
    ],
)
def test_sizes_that_are_none_are_refused(folder, options, said, capsys):
    assert main(["export", str(folder), "--format", "onnx", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_fixed_size_opens_export_to_networks_of_one_size(tmp_path):
    model = timm.create_model("test_vit", num_classes=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    size = model.pretrained_cfg["input_size"][1:]
    done = export(tmp_path, "torchscript", fixed=InputSize(tuple(size)))
    assert done.path.exists()


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("dialect", ["plain", "onnx", "pytorch", "delegate"])
def test_every_layer_of_a_copy_is_replaced(dialect):
    model = network("test_resnet_ema", num_classes=4)
    x, layers = torch.randn(2, 3, 64, 48), count(model, EmaAttn)
    for net in (model, reparameterize_model(model)):
        for image in (None, x):
            ready = ready_to_export(net, dialect, image)
            assert (count(ready, EmaAttn), count(ready, ExportedEma)) == (0, layers)
            assert not ready.training
            assert_same(ready, model, [x.shape])
        assert (count(net, EmaAttn), count(net, ExportedEma)) == (layers, 0)


def test_a_layer_alone_and_a_layer_that_a_network_uses_twice_are_replaced():
    layer, x = network("test_resnet_ema", num_classes=4).layer1[0].se, torch.randn(2, 32, 9, 6)
    assert isinstance(ready_to_export(layer), ExportedEma)
    assert_same(ready_to_export(layer), layer, [x.shape])
    twice = nn.Sequential(layer, nn.Sequential(layer)).eval()
    ready = ready_to_export(twice)
    assert ready[0] is ready[1][0]
    assert_same(ready, twice, [x.shape])


@pytest.mark.parametrize("dialect", ["plain", "onnx", "pytorch"])
def test_exported_layers_are_compiled_as_scripts(dialect):
    layer = network("test_resnet_ema", num_classes=4).layer1[0].se
    for image in (None, torch.randn(1, 32, 5, 6)):
        scripted = torch.jit.script(ready_to_export(layer, dialect, image))
        assert_same(scripted, layer, [(2, 32, 5, 6)])


def test_the_copy_shares_no_memory_with_the_network():
    layer = EmaAttn(8, groups=2).double().eval()
    ready, x = ready_to_export(layer), torch.randn(1, 8, 5, 6).double()
    before = ready(x)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(ready(x), before, rtol=0, atol=0)


def test_an_unknown_dialect_is_an_error_that_names_the_others():
    with pytest.raises(ValueError, match=r"one of \('plain', 'onnx', .*, got 'openvino'"):
        ready_to_export(EmaAttn(8, groups=2), "openvino")


WAYS = {
    "dynamo, reparam": ("onnx", True, "dynamo"),
    "legacy": ("onnx", False, "legacy"),
    "legacy, reparam": ("onnx", True, "legacy"),
    "torchscript": ("torchscript", False, "dynamo"),
    "torchscript, reparam": ("torchscript", True, "dynamo"),
    "pt2": ("pt2", False, "dynamo"),
}


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """Export a copy of the folder in one of the ways, once."""

    @functools.cache
    def run(way):
        folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("exported") / "run"))
        return export(folder, *WAYS[way])

    return run


@pytest.mark.parametrize("way", WAYS)
def test_the_file_computes_what_the_network_computes_at_any_size(exported, way):
    done, name = exported(way), FORMATS[WAYS[way][0]].file
    assert len({size[0] for size in done.sizes}) == 3
    assert 0 <= done.difference < TOLERANCE
    assert_same(FORMATS[WAYS[way][0]].open(done.path), load(done.path.parent))
    assert {p.name for p in done.path.parent.iterdir()} == {
        "config.json",
        "model.safetensors",
        name,
    }


@pytest.mark.parametrize(
    ("format", "opened"),
    [("torchscript", "torch.jit.load(f)"), ("pt2", "torch.export.load(f).module()")],
)
def test_the_file_runs_where_this_package_is_not(exported, python, format, opened):
    path = exported(format).path
    code = (
        f"import sys, torch\nf = sys.argv[1]\nout = {opened}(torch.ones(2, 3, 50, 70))\n"
        "assert not [m for m in sys.modules if m.startswith('ema_timm.')]\nprint(out.tolist())"
    )
    out = python(code, args=[path], env={"EMA_TIMM_AUTOLOAD": "0"})
    with torch.no_grad():
        want = load(path.parent)(torch.ones(2, 3, 50, 70))
    torch.testing.assert_close(torch.tensor(json.loads(out)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", [False, True], ids=["", "no cross-spatial"])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("test_resnet", "random"),
        ("test_resnet", "random, reparam"),
        ("test_resnet", "fresh"),
        ("test_resnet", "warm"),
        ("mobilenetv2_035", "random, reparam"),
    ],
)
def test_whole_networks_in_onnx_runtime(name, start, ablation, tmp_path):
    if start.startswith("random"):
        model = network(f"{name}_ema", num_classes=5, ema_cross_spatial=not ablation)
    else:  # weights that are alike in every layer are merged by the exporter
        plain = shake(timm.create_model(name, num_classes=5))
        warm = start == "warm"
        model = ema_timm.inject(plain, preserve=warm, cross_spatial=not ablation).eval()
    exported = reparameterize_model(model) if start.endswith("reparam") else model
    write_onnx(exported, torch.randn(2, 3, 40, 48), tmp_path / "m.onnx", "legacy")
    assert_same(open_onnx(tmp_path / "m.onnx"), model)


def test_int8_runs_and_reports_its_agreement(folder):
    done = export(folder, "onnx", exporter="legacy")
    report = quantize_int8(folder)
    assert report.path.stat().st_size < 0.6 * done.path.stat().st_size
    exact, small = open_onnx(done.path), open_onnx(report.path)
    x = torch.randn(SIZES[1])
    assert 0 < (exact(x) - small(x)).abs().max() < 0.2 * exact(x).abs().max()
    assert 0 < report.difference < 0.2
    assert report.same_class <= report.images == 32


def test_int8_of_the_dynamo_file(exported, folder):
    shutil.copy(exported("dynamo, reparam").path, folder)
    assert quantize_int8(folder).difference < 0.2


def altered(change):
    """TorchScript whose file, once read back, computes something else."""
    way = FORMATS["torchscript"]

    def open_altered(path):
        run = way.open(path)
        return lambda x: change(x, run(x))

    return {**FORMATS, "torchscript": way._replace(open=open_altered)}


def fails(x, out):
    if x.shape[0] == 3:
        raise RuntimeError("shape '[1, 2]' is invalid\nmore")
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, out: out * 1.001, "differs from the network by"),
        (lambda x, out: out * float("nan"), "differs from the network by nan"),
        (lambda x, out: out if x.shape[0] != 2 else out + 1, "differs from the network by"),
        (fails, "supports only the size"),
    ],
    ids=["off", "NaN", "off at one size", "fails at one size"],
)
def test_a_file_that_differs_is_not_kept(folder, monkeypatch, capsys, change, said):
    (folder / "model.torchscript").write_text("the one before")
    monkeypatch.setattr(export_module, "FORMATS", altered(change))
    with pytest.raises(VerificationError, match=said):
        export(folder, "torchscript")
    assert main(["export", str(folder), "--format", "torchscript"]) == 1
    assert "was not written" in capsys.readouterr().err
    assert (folder / "model.torchscript").read_text() == "the one before"
    assert len(list(folder.iterdir())) == 3


def test_a_file_of_one_size_is_not_kept(folder, monkeypatch):
    def write(model, example, path, exporter, free):
        torch.onnx.export(model, (example,), str(path), dynamo=False, input_names=["x"])

    onnx = FORMATS["onnx"]._replace(write=write)
    monkeypatch.setattr(export_module, "FORMATS", {**FORMATS, "onnx": onnx})
    with pytest.raises(VerificationError, match="supports only the size"):
        export(folder, "onnx", exporter="legacy")
    assert not (folder / "model.onnx").exists()


def test_command(folder, capsys):
    assert main(["export", str(folder), "--format", "onnx", "--exporter", "legacy", "--int8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}/model.onnx: agrees with the network at 1x3x")
    assert second.startswith(f"{folder}/model.int8.onnx: differs by")
    assert "of 32 random images" in second


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 40),
            "model.safetensors is damaged",
        ),
        (lambda f: shutil.rmtree(f), "there is no folder"),
    ],
)
def test_what_is_no_checkpoint_is_refused(folder, damage, said, capsys):
    damage(folder)
    assert main(["export", str(folder), "--format", "pt2"]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_work(folder, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'ema-"):
        export(folder, "onnx")
    assert export(folder, "torchscript").path.exists()


def test_a_network_of_one_size_is_refused(tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert main(["export", str(tmp_path), "--format", "pt2"]) == 2
    assert "Without --img-size the exported file" in capsys.readouterr().err


def test_the_command_offers_every_format_and_exporter(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    for choices in (FORMATS, FORMATS["onnx"].exporters):
        assert f"{{{','.join(choices)}}}" in text


@pytest.mark.parametrize("option", [["--int8"], ["--exporter", "legacy"]])
def test_options_of_onnx_go_with_onnx(option, capsys):
    assert main(["export", "anywhere", "--format", "pt2", *option]) == 2
    assert "need --format onnx, got --format pt2" in capsys.readouterr().err


def test_half_precision_goes_with_ncnn(capsys):
    assert main(["export", "anywhere", "--format", "onnx", "--fp16"]) == 2
    assert "--fp16 needs --format ncnn, got --format onnx" in capsys.readouterr().err


def test_ncnn_computes_one_image_at_a_time(folder, monkeypatch, capsys):
    monkeypatch.setattr(errors, "find_spec", lambda name: True)
    assert main(["export", str(folder), "--format", "ncnn", "--batch-size", "2"]) == 2
    assert "one image at a time, got --batch-size 2" in capsys.readouterr().err


# timm's own onnx_export.py.


@pytest.mark.skipif(not REPO, reason="set TIMM_REPO to a clone of timm to run this")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dynamic-size"],
        ["--dynamic-size", "--reparam"],
        ["--dynamic-size", "--reparam", "--dynamo"],
    ],
    ids=" ".join,
)
def test_timms_script(options, tmp_path):
    shutil.copy(Path(REPO) / "onnx_export.py", tmp_path)
    model = network("test_resnet_ema", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    command = ["onnx_export.py", "m.onnx", "--model", "test_resnet_ema", "--num-classes", "5"]
    command += ["--checkpoint", "weights.pt", "--img-size", "64", "--check-forward", *options]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    sizes = SIZES if options else [(1, 3, 64, 64), (5, 3, 64, 64)]
    assert_same(open_onnx(tmp_path / "m.onnx"), model, sizes)
