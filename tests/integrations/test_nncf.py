"""NNCF's default int8 takes networks with the layer, as OpenVINO and ONNX files."""

import warnings

import pytest
import torch
from torch import nn

from ema_timm import EmaAttn
from ema_timm.export import ready_to_export, write_onnx
from ema_timm.integrations.int8 import layer_patterns

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    nncf = pytest.importorskip("nncf", reason="not run: pip install 'ema-timm[friends]'")
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES = list(torch.randn(4, 1, 3, 10, 10, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), EmaAttn(32, groups=8), nn.Conv2d(32, 8, 3)
    )
    for parameter in network[2].parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.eval()


def error(run, model) -> float:
    with torch.no_grad():
        want = torch.cat([model(x) for x in IMAGES])
    found = torch.cat([torch.as_tensor(run(x.numpy())) for x in IMAGES])
    return float((found - want).norm() / want.norm())


def ready(model, sizes, dialect="plain"):
    return ready_to_export(model, dialect, IMAGES[0] if sizes == "fixed" else None)


def openvino_error(model, sizes, patterns=()):
    openvino = pytest.importorskip("openvino")
    converted = openvino.convert_model(ready(model, sizes), example_input=IMAGES[0])
    small = nncf.quantize(
        converted,
        nncf.Dataset(IMAGES, lambda x: x.numpy()),
        subset_size=len(IMAGES),
        ignored_scope=nncf.IgnoredScope(patterns=list(patterns)),
    )
    # On CPUs that have it OpenVINO computes in bfloat16 unless told otherwise.
    compiled = openvino.compile_model(small, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return error(lambda x: compiled(x)[0], model)


@pytest.mark.parametrize("sizes", ["free", "fixed"])
def test_openvino(model, sizes):
    assert openvino_error(model, sizes) < 0.1


def test_layers_in_floating_point_are_more_exact(model):
    patterns = layer_patterns(model)
    assert openvino_error(model, "free", patterns) < openvino_error(model, "free")


@pytest.mark.parametrize(("exporter", "sizes"), [("dynamo", "fixed"), ("legacy", "free")])
def test_onnx(model, exporter, sizes, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file, free = tmp_path / "m.onnx", {} if sizes == "fixed" else {0: "batch"}
    write_onnx(ready(model, sizes, "onnx"), IMAGES[0], file, exporter, free)
    data = nncf.Dataset(IMAGES, lambda x: {"x": x.numpy()})
    small = nncf.quantize(onnx.load(file), data, subset_size=len(IMAGES))
    session = onnxruntime.InferenceSession(small.SerializeToString())
    assert error(lambda x: session.run(None, {"x": x})[0], model) < 0.1


def test_a_network_without_the_layer_has_no_patterns():
    with pytest.raises(ValueError, match="Sequential holds no EMA attention layer"):
        layer_patterns(nn.Sequential(nn.Conv2d(3, 8, 3)))
