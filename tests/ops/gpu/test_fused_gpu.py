"""The fused kernels on a real GPU: `pytest -m gpu` where one is at hand."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import oracle
from support.gpu import GRID, LAYOUTS, NEEDS_GPU, TYPES, on_gpu

from ema_timm import ema_attention, set_implementation

pytestmark = NEEDS_GPU


def run(x, weights, groups):
    return ema_attention(x, weights, groups, impl="fused")


@pytest.fixture
def poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), GRID)
def test_every_shape_type_and_layout(poison, shape, groups, layout, dtype):
    oracle.assert_matches(run, on_gpu(shape, groups, dtype, layout))


@pytest.mark.parametrize(("shape", "groups"), GRID[:4])
def test_ten_repeats_are_bit_equal(shape, groups):
    case = on_gpu(shape, groups, torch.bfloat16, "channels_last")
    first = oracle.output_and_gradients(run, case)
    for _ in range(10):
        again = oracle.output_and_gradients(run, case)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("amp", [False, True])
def test_a_resnet50_step_equals_that_of_the_closed_form(amp):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50_ema", num_classes=10, zero_init_last=False).cuda()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    target = torch.arange(8, device="cuda")
    found = {}
    for impl in ("closed_form", "fused"):
        set_implementation(model, impl)
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        found[impl] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found["fused"][0] == pytest.approx(found["closed_form"][0], rel=2e-2 if amp else 1e-4)
    cosine = torch.cosine_similarity(found["fused"][1], found["closed_form"][1], dim=0)
    assert cosine > (0.98 if amp else 0.9999)


def test_a_cuda_graph_replays_it():
    case = on_gpu((4, 256, 28, 28), 32, torch.bfloat16, "channels_last")
    with torch.no_grad():
        expected = run(case.x, case.weights, 32)
        graph = torch.cuda.CUDAGraph()
        still = case.x.detach().clone(memory_format=torch.preserve_format)
        with torch.cuda.graph(graph):
            out = run(still, case.weights, 32)
        out.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input():
    case = on_gpu((2, 64, 9, 9), 8, torch.float32, "contiguous", device="cuda:1")
    assert torch.cuda.current_device() == 0
    oracle.assert_matches(run, case)


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    code = (
        "import torch\n"
        "from support import oracle\n"
        "from support.gpu import on_gpu\n"
        "from ops.gpu.test_fused_gpu import run\n"
        "for shape, groups in [((1, 24, 9, 7), 3), ((1, 80, 5, 6), 2)]:\n"
        "    for layout in ('contiguous', 'channels_last', 'sliced'):\n"
        "        oracle.assert_matches(run, on_gpu(shape, groups, torch.float16, layout))"
    )
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
