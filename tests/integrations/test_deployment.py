"""Runtimes and tools that take a network as it is: compiled, converted, traced, looked into."""

import pytest
import timm
import torch
from support.networks import shake
from timm.utils import AttentionExtract

from ema_timm import EmaAttn
from ema_timm.export.formats import write_onnx

# The tools warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = [(1, 3, 64, 64), (3, 3, 41, 96), (2, 3, 80, 33)]


@pytest.fixture(scope="module")
def model():
    network = shake(timm.create_model("test_resnet_ema", num_classes=5)).eval()
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, EmaAttn):
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return network


def assert_same(run, model, sizes=SIZES):
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(size)
            want = model(x)
            assert (run(x) - want).abs().max() < 1e-4 * want.abs().max(), size


@pytest.mark.parametrize("source", ["onnx", "pytorch"])
def test_openvino(model, source, tmp_path):
    openvino = pytest.importorskip("openvino")
    if source == "onnx":
        write_onnx(model, torch.randn(2, 3, 40, 48), tmp_path / "m.onnx", "legacy")
        converted = openvino.Core().read_model(tmp_path / "m.onnx")
    else:
        converted = openvino.convert_model(model, example_input=torch.randn(2, 3, 40, 48))
    # On CPUs that have it OpenVINO computes in bfloat16 unless told otherwise.
    hint = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(converted, "CPU", hint)
    assert_same(lambda x: torch.from_numpy(compiled(x.numpy())[0]), model)


def test_openvino_and_nncf_send_no_telemetry(python, tmp_path):
    """They would fork a process for each message, and note the use in the home folder."""
    pytest.importorskip("openvino")
    code = """
import importlib.util, threading, warnings
import torch
from ema_timm import EmaAttn
from ema_timm.bench.runtimes import load_runtime

warnings.simplefilter("ignore")
layer = torch.nn.Sequential(EmaAttn(8, groups=2)).eval()
load_runtime("openvino", layer, torch.randn(1, 8, 6, 6), fixed=True)
if importlib.util.find_spec("nncf"):
    import nncf.telemetry
    print(type(nncf.telemetry.telemetry).__name__)
import openvino.tools.ovc
print(type(openvino.tools.ovc.telemetry).__module__)
print([t.name for t in threading.enumerate()])
"""
    said = python(code, env={"HOME": str(tmp_path), "CI": ""}).splitlines()
    assert said[-2:] == ["openvino.tools.ovc.telemetry_stub", "['MainThread']"]
    assert said[:-2] in ([], ["MagicMock"])
    assert not list(tmp_path.glob("intel"))


def test_no_telemetry_can_be_sent_from_tests():
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """One layer: some whole networks, plain ones too, come out wrong at odd sizes."""
    if not hasattr(torch._inductor, "aoti_load_package"):
        pytest.skip("AOTInductor packages need PyTorch 2.6")
    layer = EmaAttn(16, groups=4).eval()
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(layer, (torch.randn(2, 16, 8, 6),), dynamic_shapes=shapes)
    package = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    assert_same(compiled, layer, [(2, 16, 8, 6), (1, 16, 5, 9), (3, 16, 32, 32)])


def by_hook(model, name, x):
    seen = []
    with (
        torch.no_grad(),
        model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2].clone())),
    ):
        model(x)
    return seen[0]


def test_torchvision_feature_extraction(model):
    """The operator is one node, so its output is a feature like any other."""
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {"layer2.0.se.ema_attention": "gated", "layer4": "last"}
    extractor = create_feature_extractor(model, nodes)
    for size in SIZES[:2]:
        x = torch.randn(size)
        with torch.no_grad():
            found = extractor(x)
        torch.testing.assert_close(found["last"], by_hook(model, "layer4", x))
        torch.testing.assert_close(found["gated"], by_hook(model, "layer2.0.se", x))


def test_timm_fx_features(model):
    from timm.models._features_fx import GraphExtractNet, get_graph_node_names

    names = get_graph_node_names(model)[1]
    gates = [name for name in names if name.endswith("ema_attention")]
    assert gates == [f"layer{i}.0.se.ema_attention" for i in (1, 2, 3, 4)]
    x = torch.randn(SIZES[0])
    with torch.no_grad():
        found = GraphExtractNet(model, gates[-1:])(x)
    torch.testing.assert_close(found, by_hook(model, "layer4.0.se", x))


@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    [
        ("test_resnet_ema", "fx", "*.se.ema_attention"),
        # In a ResNet the shortcut is added in place to the very tensor that a hook has kept.
        ("mobilenetv2_035_ema", "hook", "*.se"),
    ],
)
def test_timm_attention_extract(name, method, pattern):
    """By name, the gated maps: the layer has no softmaxed attention matrix to give."""
    model = shake(timm.create_model(name)).eval()
    layers = [path for path, m in model.named_modules() if isinstance(m, EmaAttn)]
    x = torch.randn(SIZES[1])
    with torch.no_grad():
        found = AttentionExtract(model, names=[pattern], method=method)(x)
    found = {key.removesuffix(".ema_attention"): value for key, value in found.items()}
    assert set(layers) <= set(found)
    for path in layers:
        torch.testing.assert_close(found[path], by_hook(model, path, x))


@pytest.mark.parametrize("name", ["test_resnet_ema", "mobilenetv2_035_ema"])
def test_grad_cam_on_the_layer(name):
    """Its hooks get the gradient of the layer's output, also where the block changes it."""
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = shake(timm.create_model(name, num_classes=5)).eval()
    layer = [m for m in model.modules() if isinstance(m, EmaAttn)][1]
    x = torch.randn(2, 3, 64, 64)
    with GradCAM(model, [layer]) as cam:
        maps = cam(x, [ClassifierOutputTarget(1)] * 2)
        (found,) = cam.activations_and_grads.gradients
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert maps.max() > 0.99
    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        return output.clone()  # for the block to add its shortcut to

    with layer.register_forward_hook(keep):
        score = model(x)[:, 1].sum()
    torch.testing.assert_close(found, torch.autograd.grad(score, kept[0])[0])
