"""`auto` on a real GPU, the passes of PyTorch's operators: `pytest -m gpu` where one is at hand."""

import contextlib

import pytest
import torch
from support import oracle
from support.gpu import GRID, LAYOUTS, NEEDS_GPU, NETWORKS, TYPES, on_gpu

from ema_timm import EmaAttn, ema_attention
from ema_timm.bench.authors_code import AuthorsEmaAttn
from ema_timm.bench.bytes import Setting, count_layer

pytestmark = NEEDS_GPU


def run(x, weights, groups):
    return ema_attention(x, weights, groups, impl="closed_form")


@contextlib.contextmanager
def tf32(allowed):
    """Whether products of float32 may be rounded to TF32, in matrices and in convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), GRID)
def test_every_shape_type_and_layout(shape, groups, layout, dtype):
    """In half precision sums that cancel are rounding elsewhere than in the networks' maps."""
    every = dtype == torch.float32 or (shape, groups) in NETWORKS
    names = {} if every else {"names": ("out", "x")}
    oracle.assert_matches(run, on_gpu(shape, groups, dtype, layout), **names)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), NETWORKS)
def test_no_setting_rounds_float32_to_tf32(shape, groups, layout):
    case = on_gpu(shape, groups, torch.float32, layout)
    with tf32(True):
        oracle.assert_matches(run, case)
        rounded = oracle.output_and_gradients(run, case)
    with tf32(False):
        exact = oracle.output_and_gradients(run, case)
    for name, value in exact.items():
        scale = max(value.abs().max().item(), 1e-3)
        assert oracle.relative_error(rounded[name], value.double(), scale) < 5e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_half_precision_is_no_worse_than_the_authors_form(mean, dtype):
    total = {"ours": 0.0, "authors": 0.0}
    for seed in range(6):
        case = on_gpu((2, 64, 14, 14), 8, dtype, "channels_last", seed=seed)
        case = case._replace(x=(case.x.detach() + mean).requires_grad_())
        truth = oracle.expected(case)
        layer = AuthorsEmaAttn(64, groups=8).cuda()
        names = [name for name, _ in layer.named_parameters()]

        def authors(x, weights, groups, layer=layer, names=names):
            with torch.autocast("cuda", x.dtype):
                named = dict(zip(names, weights, strict=True))
                return torch.func.functional_call(layer, named, (x,)).to(x.dtype)

        found = {
            name: oracle.output_and_gradients(form, case)
            for name, form in (("ours", run), ("authors", authors))
        }
        for key in ("out", "x"):
            if found["authors"][key].isfinite().all():
                for name in total:
                    total[name] += oracle.relative_error(found[name][key], truth[key])
    assert total["ours"] <= 1.1 * total["authors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_forward_keeps_what_was_counted_without_a_gpu(layout, dtype):
    batch, shape = 64, (256, 28, 28)
    setting = Setting(batch, str(dtype).removeprefix("torch."), layout)
    counted = count_layer(EmaAttn, shape, setting)["saved_bytes"]
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(batch, *shape, device="cuda").to(dtype, memory_format=format).requires_grad_()
    layer = EmaAttn(256, groups=32, device="cuda")
    for _ in range(2):  # libraries take memory of their own the first time
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = layer(x)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        del out
    assert kept <= 1.05 * counted + 2**20  # the allocator rounds up


def test_a_cuda_graph_replays_a_training_step():
    case = on_gpu((4, 256, 28, 28), 32, torch.bfloat16, "channels_last")
    layer = EmaAttn(256, groups=32, device="cuda", dtype=torch.bfloat16)
    still = case.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(layer, (still,))
    found = {}
    for name, form in (("plain", layer.forward), ("graphed", graphed)):
        x = case.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = EmaAttn.forward(layer, x) if name == "plain" else form(x)
        found[name] = out, *torch.autograd.grad(out, [x, *layer.parameters()], case.grad)
    for plain, replayed in zip(found["plain"], found["graphed"], strict=True):
        torch.testing.assert_close(replayed, plain, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_it_equals_the_definition(layout):
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    oracle.assert_matches(compiled, on_gpu((2, 64, 28, 28), 8, torch.bfloat16, layout))
    torch._dynamo.reset()
