"""Files of ncnn: pnnx converts every layer, and ncnn computes what the network computes.

They need the extra ``ncnn``; `.ci/run` runs them where it is installed.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from support.networks import shake
from torch import nn

from ema_timm import EmaAttn
from ema_timm.cli import main
from ema_timm.errors import VerificationError
from ema_timm.export.formats import FORMATS
from ema_timm.export.inputs import InputSize
from ema_timm.export.ncnn import open_ncnn, write_ncnn
from ema_timm.export.write import EXPORT_TOLERANCE, FP16_TOLERANCE, export

pytest.importorskip("ncnn", reason="needs the extra ncnn")
pytest.importorskip("pnnx", reason="needs the extra ncnn")

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's tracer warns about its own future
GUIDE = Path(__file__).resolve().parents[2] / "ema_timm" / "export" / "README.md"
TOLERANCE = 1e-5  # of one layer, relative to its largest output
long = pytest.mark.long


def network(name):
    model = shake(timm.create_model(name, num_classes=4)).eval()
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, EmaAttn):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each name, written once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            timm.models.save_for_hf(network(name), made[name], safe_serialization=True)
        return made[name]

    return folder


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("size", [96, 224])
@pytest.mark.parametrize(
    "name",
    [
        "test_resnet_ema",
        "mobilenetv2_035_ema",
        pytest.param("resnet50_ema", marks=long),
        pytest.param("mobilenetv2_100_ema", marks=long),
    ],
)
def test_command(saved, name, size, fp16, tmp_path, capsys):
    folder = Path(shutil.copytree(saved(name), tmp_path / "run"))
    options = ["--img-size", str(size), *(["--fp16"] if fp16 else [])]
    assert main(["export", str(folder), "--format", "ncnn", *options]) == 0
    shape = f"1x3x{size}x{size}"
    assert f"model.ncnn.param: agrees with the network at {shape}" in capsys.readouterr().out
    files = {"model.ncnn.param", "model.ncnn.bin", "model.ncnn.json"}
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", *files}
    weights = (folder / "model.safetensors").stat().st_size
    assert (folder / "model.ncnn.bin").stat().st_size < (0.6 if fp16 else 1.05) * weights
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        want = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
    difference = (open_ncnn(folder / "model.ncnn.param")(x) - want).abs().max()
    assert difference < (FP16_TOLERANCE if fp16 else EXPORT_TOLERANCE) * want.abs().max()


@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [(32, 8, (20, 28)), (8, 8, (6, 5)), (8, 1, (9, 9)), (24, 8, (1, 1)), (16, 2, (1, 7))],
)
def test_a_layer_that_is_traced_as_it_is(channels, groups, size, tmp_path):
    """As ultralytics does, which knows no dialects."""
    torch.manual_seed(0)
    layer = EmaAttn(channels, groups=groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), layer, nn.Flatten()).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        write_ncnn(model, x, tmp_path / "m.param", {})
        found = open_ncnn(tmp_path / "m.param")(x)
        assert (found - model(x)).abs().max() < TOLERANCE * model(x).abs().max()


def test_the_networks_own_size_and_what_a_programmer_needs(saved, tmp_path):
    folder = Path(shutil.copytree(saved("test_resnet_ema"), tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = ["oak", "elm", "fir", "yew"]
    (folder / "config.json").write_text(json.dumps(config))
    done = export(folder, "ncnn")
    assert done.sizes == [(1, 3, 160, 160)] * 3
    described = json.loads((folder / "model.ncnn.json").read_text())
    assert described["label_names"] == config["label_names"]
    assert described["input_size"] == [3, 160, 160]
    keys = ("mean", "std", "interpolation", "crop_pct")
    assert {k: described[k] for k in keys} == {k: config["pretrained_cfg"][k] for k in keys}


def test_the_program_of_the_guide(saved, tmp_path, monkeypatch):
    """It gives the network a black image."""
    folder = Path(shutil.copytree(saved("test_resnet_ema"), tmp_path / "runs" / "flowers"))
    export(folder, "ncnn", fixed=InputSize((96, 64)))
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.M | re.S)
    (program,) = [block for block in blocks if "import ncnn" in block]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    with torch.no_grad():
        want = model((-mean / std).expand(1, 3, 96, 64))[0]
    difference = (torch.from_numpy(names["logits"]) - want).abs().max()
    assert difference < 1e-2 * want.abs().max()  # ncnn's default is half precision


def test_files_that_do_not_belong_together_are_not_left(saved, tmp_path, monkeypatch):
    """A kill between the files leaves no ``.param``; a failed conversion leaves the old files."""
    folder = Path(shutil.copytree(saved("test_resnet_ema"), tmp_path / "run"))
    export(folder, "ncnn", fixed=InputSize((64, 64)))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    wrong = FORMATS["ncnn"]._replace(open=lambda path: lambda x: open_ncnn(path)(x) * 1.01)
    monkeypatch.setitem(FORMATS, "ncnn", wrong)
    with pytest.raises(VerificationError, match="differs from the network by"):
        export(folder, "ncnn", fixed=InputSize((96, 96)))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr("ema_timm.checkpoints.folder.write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(folder, "ncnn", fixed=InputSize((96, 96)))
    assert "model.ncnn.param" not in {p.name for p in folder.iterdir()}


def interrupted(path, write):
    raise KeyboardInterrupt


def test_a_network_that_pnnx_does_not_convert_is_one_line(saved, tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(saved("test_resnet_ema"), tmp_path / "run"))
    monkeypatch.setattr("pnnx.EXEC_PATH", shutil.which("false"))
    assert main(["export", str(folder), "--format", "ncnn"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "pnnx cannot convert the network (exit code 1)" in said[0]
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
