"""The fused Triton kernels against the definition, on a GPU or in Triton's interpreter."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from support import oracle

from ema_timm import EmaAttn, ema_attention, set_implementation
from ema_timm.bench.counter import Counter
from ema_timm.bench.layer import AuthorsEmaAttn
from ema_timm.errors import CannotCompileError
from ema_timm.ops import EmaWeights
from ema_timm.ops.formula import fold
from ema_timm.ops.gpu.steps import fold_in_few_operators

triton = pytest.importorskip("triton", reason="PyTorch for this platform comes without Triton")
if not hasattr(triton.language, "gather"):
    pytest.skip(f"the kernels need Triton 3.3, found {triton.__version__}", allow_module_level=True)

from ema_timm.ops.gpu.fused import launch, tiling  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(case):
    """The case where the kernels run: a GPU, or the CPU under the interpreter."""

    def move(t):
        return t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    weights = EmaWeights(*map(move, case.weights))
    return oracle.Case(move(case.x), weights, case.groups, move(case.grad))


# Kernels are compiled in a process of their own: in this one they are interpreted.
COMPILING = {"TRITON_INTERPRET": "0"}
OFFLINE = (
    "import sys, torch\n"
    f"sys.path.insert(0, {str(Path(oracle.__file__).parents[1])!r})\n"
    "from support import offline, oracle\n"
)


def run(x, weights, groups):
    return ema_attention(x, weights, groups, impl="fused")


@pytest.fixture
def poison():
    """Memory is handed out full of NaN, so that nothing unwritten passes for a result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_poison_works(poison):
    x = torch.randn(2, 4, 3, 3)
    for memory in (torch.empty(3), torch.empty_like(x), x.new_empty((2, 2))):
        assert memory.isnan().all()


# Shape, groups: n, H and W on and off powers of two; one and several steps a tile; narrow and wide
# groups.
SHAPES = [
    ((2, 16, 7, 5), 4),
    ((1, 6, 9, 12), 2),
    ((1, 4, 40, 67), 1),
    ((2, 32, 4, 4), 1),
    ((1, 3, 6, 5), 3),
    ((1, 15, 1, 9), 3),
    ((1, 10, 8, 1), 2),
    ((2, 8, 1, 1), 2),
    ((1, 9, 2, 2), 3),
    pytest.param((2, 66, 5, 6), 2, marks=pytest.mark.slow),
    pytest.param((1, 128, 3, 2), 1, marks=pytest.mark.slow),
    ((1, 48, 1, 7), 1),
    ((1, 34, 1, 1), 1),
    pytest.param((1, 33, 3, 66), 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_float32_output_and_gradients_equal_the_definition(poison, shape, groups):
    oracle.assert_matches(run, on_device(oracle.make_case(shape, groups)))


# One sample in one group: every size that is not of the channels is 1 somewhere.
SINGLE = [(1, 3, 1, 6), (1, 3, 6, 1), (1, 3, 1, 1), (1, 34, 1, 6), (1, 34, 6, 1), (1, 34, 1, 1)]


@pytest.mark.parametrize("shape", SINGLE)
def test_sizes_of_one_in_training_and_inference(poison, shape):
    case = on_device(oracle.make_case(shape, 1))
    oracle.assert_matches(run, case)
    with torch.no_grad():
        out = run(case.x, case.weights, 1)
    assert torch.equal(out, run(case.x, case.weights, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *[
            ((2, 16, 8, 8), layout)
            for layout in ("contiguous", "channels_last", "sliced", "transposed")
        ],
        *[((1, 80, 4, 6), layout) for layout in ("contiguous", "channels_last")],
        *[
            pytest.param((1, 80, 4, 6), layout, marks=pytest.mark.slow)
            for layout in ("sliced", "transposed")
        ],
    ],
)
def test_every_type_and_layout(poison, shape, layout, dtype):
    oracle.assert_matches(run, on_device(oracle.make_case(shape, 2, dtype, layout)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_tiling_of_a_map_changes_nothing(monkeypatch, layout):
    case = on_device(oracle.make_case((1, 6, 5, 19), 2, layout=layout))
    expected = oracle.output_and_gradients(run, case)
    monkeypatch.setattr(tiling, "SHARE", 16)
    monkeypatch.setattr(tiling, "THREAD", 1)
    for name, value in oracle.output_and_gradients(run, case).items():
        assert oracle.relative_error(value, expected[name].double()) < 1e-5, name


def test_gradients_laid_out_unlike_the_input(poison):
    case = on_device(oracle.make_case((1, 16, 6, 8), 2, layout="channels_last"))
    expanded = torch.randn(1, 16, 6, 1, device=DEVICE).expand(1, 16, 6, 8)
    oracle.assert_matches(run, case._replace(grad=expanded))


@pytest.mark.parametrize(
    "shape", [(2, 16, 9, 8), pytest.param((1, 80, 5, 9), marks=pytest.mark.slow)]
)
def test_the_same_bits_every_time(shape):
    case = on_device(oracle.make_case(shape, 2))
    first = oracle.output_and_gradients(run, case)
    for _ in range(9 if DEVICE == "cuda" else 1):
        again = oracle.output_and_gradients(run, case)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


class Noted:
    """Stands in for a kernel: notes its launches, and runs nothing."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_training_step_is_three_launches_and_few_small_operators(monkeypatch, layout):
    case = on_device(oracle.make_case((2, 16, 6, 5), 2, torch.bfloat16, layout))
    weights = EmaWeights(*[w.detach().float() for w in case.weights])
    grad = torch.empty_like(case.x).copy_(case.grad)
    launched = []
    for module, name in [
        (launch.forward_kernels, "forward_tile"),
        (launch.backward_kernels, "backward_tile"),
        (launch.weight_gradients, "sum_tiles"),
    ]:
        monkeypatch.setattr(module, name, Noted(name, launched))
    with torch.no_grad(), Counter() as forward:
        _, saved = launch.forward(case.x, fold_in_few_operators(weights), 2, save=True)
    with torch.no_grad(), Counter() as backward:
        launch.backward(grad, case.x, saved, weights, 2)
    assert launched == ["forward_tile", "backward_tile", "sum_tiles"]
    assert forward.launches <= 5, forward.lines
    assert backward.launches <= 5, backward.lines


@pytest.mark.parametrize("n", [1, 3, 8, 64])
def test_weights_folded_in_few_operators_are_those_of_the_derivation(n):
    weights = oracle.make_weights(n)
    with torch.no_grad(), Counter() as counter:
        folded = fold_in_few_operators(weights)
    assert counter.launches <= 4, counter.lines
    for found, expected in zip(folded, fold(weights), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("n", "tiles"), [(3, 1), (8, 65), (16, 200), (40, 70), (72, 3)])
def test_sums_over_tiles_are_those_of_whole_tables(poison, n, tiles):
    """More tiles than a step takes, and fewer; columns on and off the blocks' borders."""
    gen = torch.Generator().manual_seed(n)
    parts = torch.randn(tiles, 14 * n + n * n, generator=gen).to(DEVICE)
    means, v = torch.randn(tiles, 9 * n, generator=gen).to(DEVICE), torch.rand(n).to(DEVICE)
    weights = EmaWeights(*[w.detach().to(DEVICE) for w in oracle.make_weights(n, torch.float32)])
    found = launch.sum_over_tiles(parts, means, v, weights)
    again = launch.sum_over_tiles(parts, means, v, weights)
    dk, dm, *vectors, mix = parts.double().split([9 * n, *[n] * 5, n * n], dim=1)
    gamma, beta, conv3x3_bias, mix_bias = [t.sum(0) for t in vectors]
    through_taps = torch.outer(v.double(), dk.sum(0))
    expected = EmaWeights(
        mix.sum(0), mix_bias, dm.t() @ means.double() + through_taps, conv3x3_bias, gamma, beta
    )
    for name, one, other, truth in zip(EmaWeights._fields, found, again, expected, strict=True):
        assert torch.equal(one, other), name
        assert oracle.relative_error(one, truth.view_as(one)) < 1e-6, name


def awkward_inputs():
    gen = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 12, 10, generator=gen)
    return {
        "far from zero": 1000 + noise,
        "constant": noise[..., :1, :1].expand_as(noise).contiguous(),
        "large": 1e4 * noise,
        "tiny": 1e-30 * noise,
    }


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid(-100) is 0
@pytest.mark.parametrize(
    "layout",
    [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", awkward_inputs())
def test_awkward_inputs_lose_no_more_than_the_authors_form(name, layout):
    x = awkward_inputs()[name].contiguous(memory_format=layout)
    authors = AuthorsEmaAttn(16, groups=2)
    oracle.make_weights(8, torch.float32)
    authors.load_state_dict(
        dict(zip(authors.state_dict(), oracle.make_weights(8, torch.float32), strict=True))
    )
    weights = authors.weights()
    truth = ema_attention(x.double(), EmaWeights(*[w.double() for w in weights]), 2, "reference")
    moved = EmaWeights(*[w.detach().to(DEVICE) for w in weights])
    found = run(x.to(DEVICE), moved, 2).cpu()
    assert found.isfinite().all()
    scale = truth.abs().max().item()
    error = oracle.relative_error(found, truth, scale)
    assert error <= 2 * oracle.relative_error(authors(x), truth, scale) + 2**-23


@pytest.mark.parametrize("frozen", [["x"], list(EmaWeights._fields), ["gn_weight", "conv1x1_bias"]])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(frozen):
    case = on_device(oracle.make_case((1, 8, 5, 6), 2))
    expected = oracle.output_and_gradients(run, case)
    for name, tensor in zip(oracle.NAMES, [case.x, *case.weights], strict=True):
        tensor.requires_grad_(name not in frozen)
    run(case.x, case.weights, 2).backward(case.grad)
    for name, tensor in zip(oracle.NAMES, [case.x, *case.weights], strict=True):
        if name in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[name])


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (0, 80, 4, 4)])
def test_no_samples(shape):
    case = on_device(oracle.make_case(shape, 2))
    found = oracle.output_and_gradients(run, case)
    assert found["out"].shape == shape
    assert all(not value.any() for value in found.values())


def test_inference_keeps_nothing_and_training_less_than_half_of_the_input():
    case = on_device(oracle.make_case((2, 16, 16, 16), 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(case.x, case.weights, 2)
        inputs = {t.data_ptr() for t in (case.x, *case.weights)}
        extra = sum(t.numel() for t in kept if t.data_ptr() not in inputs)
        assert 0 < extra < case.x.numel() / 2
        kept.clear()
        with torch.no_grad():
            run(case.x, case.weights, 2)
        assert not kept


def test_autocast_computes_statistics_in_float32():
    case = on_device(oracle.make_case((1, 16, 6, 6), 2, torch.bfloat16))
    expected = run(case.x, case.weights, 2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = run(case.x, case.weights, 2)
    assert torch.equal(found, expected)
    # Parameters stay float32 under autocast, and so do their gradients.
    wide = EmaWeights(*[w.detach().float().requires_grad_() for w in case.weights])
    run(case.x, wide, 2).backward(case.grad)
    assert all(w.grad.dtype == torch.float32 for w in wide)


def test_derivatives_of_derivatives():
    case = on_device(oracle.make_case((1, 8, 4, 3), 2))

    def penalty(impl):
        out = ema_attention(case.x, case.weights, 2, impl)
        (dx,) = torch.autograd.grad((out * case.grad).sum(), case.x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [case.x, *case.weights])

    for found, expected in zip(penalty("fused"), penalty("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 8, 3, 4), "contiguous"),
        pytest.param((1, 70, 2, 2), "channels_last", marks=pytest.mark.slow),
    ],
)
def test_passes_pytorchs_own_operator_checks(shape, layout):
    case = on_device(oracle.make_case(shape, 2, layout=layout))
    from ema_timm.ops import operators  # registers them  # noqa: F401

    torch.library.opcheck(torch.ops.ema_timm.fused, (case.x, *case.weights, 2, True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), EmaAttn(16, groups=4), torch.nn.ReLU()
    ).to(DEVICE)
    set_implementation(block, "fused")
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    block(x).square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    torch.compile(block, fullgraph=True, backend=backend)(x).square().sum().backward()
    for parameter, grad in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_exports_as_its_operator():
    layer = EmaAttn(16, groups=4, device=DEVICE).eval()
    set_implementation(layer, "fused")
    x = torch.randn(2, 16, 6, 5, device=DEVICE)
    sizes = {0: torch.export.Dim("b", max=64), 2: torch.export.Dim("h", max=64)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    assert "ema_timm.fused" in str(program.graph)
    other = torch.randn(1, 16, 4, 5, device=DEVICE)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda case: case._replace(x=case.x.detach().double()), "takes float32"),
        (lambda case: on_device(oracle.make_case((1, 129, 2, 2), 1)), "at most 128 channels"),
        (
            lambda case: case._replace(weights=EmaWeights(*[w.to("meta") for w in case.weights])),
            "weights are on meta",
        ),
    ],
)
def test_what_cannot_run_says_why_and_names_the_remedy(change, reason):
    case = change(on_device(oracle.make_case((1, 8, 3, 3), 2)))
    with pytest.raises(RuntimeError, match=f"{reason}.*impl='auto'"):
        run(case.x, case.weights, case.groups)


@pytest.mark.filterwarnings("ignore")
def test_transforms_that_cannot_look_inside_are_refused():
    case = on_device(oracle.make_case((1, 8, 3, 3), 2))

    def call(x):
        return run(x, case.weights, 2)

    with pytest.raises(RuntimeError, match=r"torch\.func.*impl='auto'"):
        torch.func.vmap(call)(case.x.detach()[None])
    with pytest.raises(RuntimeError, match=r"jit\.trace.*impl='auto'"):
        torch.jit.trace(call, case.x.detach(), check_trace=False)
    with pytest.raises(RuntimeError, match=r"forward-mode.*impl='auto'"):
        with torch.autograd.forward_ad.dual_level():
            call(torch.autograd.forward_ad.make_dual(case.x.detach(), case.x.detach()))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is at hand")
def test_without_a_gpu_or_triton_the_error_says_so(python):
    code = (
        "import sys, torch, ema_timm\n"
        "if sys.argv[1] == 'blocked': sys.modules['triton'] = None\n"
        "layer = ema_timm.EmaAttn(8, groups=2)\n"
        "layer(torch.randn(1, 8, 3, 3))\n"
        "assert sys.argv[1] == 'blocked' or 'triton' not in sys.modules\n"
        "ema_timm.set_implementation(layer, 'fused')\n"
        "try: layer(torch.randn(1, 8, 3, 3))\n"
        "except RuntimeError as error: print(error)"
    )
    env = {"TRITON_INTERPRET": "0"}
    assert "needs a CUDA GPU and the input is on cpu" in python(code, env=env, args=["here"])
    assert "Triton is not installed" in python(code, env=env, args=["blocked"])


def test_auto_never_takes_the_kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(launch, "forward", lambda *_: pytest.fail("auto took the kernels"))
    EmaAttn(8, groups=2)(torch.randn(1, 8, 3, 3)).sum().backward()


def failing(raised):
    """Stands in for a kernel whose launch, and what it compiles first, fails."""

    class Failing:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                raise raised

            return launch

    return Failing()


@pytest.mark.parametrize(
    "raised",
    [
        PermissionError(13, "Permission denied", "/home/x/.triton/cache"),
        OSError(30, "Read-only file system", "/cache"),
        NotADirectoryError(20, "Not a directory", "/file/cache"),
        FileNotFoundError(2, "No such file or directory", "gcc"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        RuntimeError("Could not create or locate cache dir"),
    ],
    ids=lambda raised: f"{type(raised).__name__}-{str(raised)[:12]}",
)
def test_what_triton_cannot_compile_or_store_is_one_line_with_the_remedy(monkeypatch, raised):
    case = on_device(oracle.make_case((1, 8, 3, 5), 2))
    monkeypatch.setattr(launch.forward_kernels, "forward_tile", failing(raised))
    with pytest.raises(CannotCompileError) as caught:
        run(case.x, case.weights, 2)
    said = str(caught.value)
    assert str(raised) in said
    assert "\n" not in said
    for word in ("CC", "TRITON_CACHE_DIR", "impl='auto'", "(1, 8, 3, 5)"):
        assert word in said


@pytest.mark.slow
def test_triton_raises_what_is_expected_where_nothing_can_be_stored(python, tmp_path):
    """The same errors from Triton itself: a cache below a file, a compiler that is not there."""
    file = tmp_path / "file"
    file.touch()
    code = OFFLINE + (
        "case = oracle.make_case((1, 8, 3, 5), 2)\n"
        "try: offline.compile_call(case.x, case.weights, 2, None, 80)\n"
        "except RuntimeError as error: print(error)\n"
        "from triton.runtime import build\n"
        "try: build._build('x', 'main.c', '.', [], [], [], [])\n"
        "except Exception as error: print(type(error).__name__)"
    )
    env = {**COMPILING, "TRITON_CACHE_DIR": str(file / "cache"), "CC": "/no/such/compiler"}
    stored, compiled = python(code, env=env).splitlines()
    assert "TRITON_CACHE_DIR" in stored
    assert compiled == "FileNotFoundError"


def test_amd_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(tiling, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = tiling.unavailable(torch.empty(1, 8, 3, 5), 4)
    assert "needs an NVIDIA GPU" in reason
    assert "HIP 6.4" in reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 8, 2, 2049), "at most 2048 columns"),
        ((1, 8, 1 << 20, 1 << 9), "less than 2.31 elements"),
    ],
)
def test_maps_too_large_are_refused_with_the_reason(shape, reason):
    assert re.search(reason, tiling.unavailable(torch.empty(shape, device="meta"), 4))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("unspecified launch failure"), RuntimeError),
        (launch.triton.runtime.errors.OutOfResources(300, 200, "shared memory"), RuntimeError),
    ],
)
def test_a_failed_launch_is_pytorchs_error_with_the_shapes(monkeypatch, raised, kind):
    case = on_device(oracle.make_case((1, 8, 3, 5), 2))
    monkeypatch.setattr(launch.forward_kernels, "forward_tile", failing(raised))
    said = str(raised)
    with pytest.raises(kind) as caught:
        launch.forward(case.x, fold(case.weights), 2, save=True)
    assert str(caught.value).startswith(said)
    assert "(1, 8, 3, 5)" in str(caught.value)
    assert "2 groups" in str(caught.value)


def test_set_implementation_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        set_implementation(EmaAttn(8, groups=2), "quick")
    with pytest.raises(ValueError, match="Linear holds no EMA attention layer"):
        set_implementation(torch.nn.Linear(2, 2), "fused")
    ablation = EmaAttn(8, groups=2, cross_spatial=False)
    with pytest.raises(ValueError, match="without cross-spatial learning"):
        set_implementation(ablation, "fused")
    assert set_implementation(ablation, "auto") == 1


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_gpus_that_are_not_here(python, capability):
    """Types, layouts and resources, which the interpreter does not look at."""
    code = (
        OFFLINE + "names = set()\n"
        "for shape, dtype, layout in [((1, 12, 9, 8), torch.bfloat16, 'contiguous'),\n"
        "                             ((1, 80, 7, 7), torch.float16, 'channels_last')]:\n"
        "    case = oracle.make_case(shape, 2, dtype, layout)\n"
        "    weights = type(case.weights)(*[w.float() for w in case.weights])\n"
        "    for k in offline.compile_call(case.x, weights, 2, case.grad, int(sys.argv[1])):\n"
        "        assert k.shared <= 48 << 10 and 0 < k.registers <= 255, k\n"
        "        names.add(k.name)\n"
        "print(*sorted(names))"
    )
    names = python(code, args=[capability], env=COMPILING).split()
    assert names == ["backward_tile", "forward_tile", "sum_tiles"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SINGLE)
def test_sizes_of_one_compile_for_training_and_inference(python, shape):
    """A size of 1 is a constant for the compiler, while the interpreter takes it for a number."""
    code = OFFLINE + (
        f"case = oracle.make_case({shape}, 1)\n"
        "for grad in (None, case.grad):\n"
        "    print(len(offline.compile_call(case.x, case.weights, 1, grad, 80)))"
    )
    assert python(code, env=COMPILING).split() == ["1", "3"]
