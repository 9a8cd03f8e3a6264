"""The closed form equals the definition: outputs, every gradient, every way of running it."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ema_timm.attention import EmaAttn
from ema_timm.bench.layer import AuthorsEmaAttn
from ema_timm.bench.timing import peak_extra_bytes, saved_bytes
from ema_timm.export import open_onnx, write_onnx
from ema_timm.ops import ema_attention
from ema_timm.ops.autograd import closed_form_eager
from ema_timm.ops.cpu import chunks, library, native
from ema_timm.ops.export.dialects import (
    DIALECTS,
    Delegate,
    Onnx,
    Plain,
    Shape,
    closed_form_exported,
)
from ema_timm.ops.export.weights import SmallMap, arrange, small_map
from ema_timm.ops.formula import (
    closed_form,
    collapsed_kernel,
    constant_channel_weights,
    convolve_to_one_channel,
    fold,
    shifted_means,
    statistics_type,
)
from ema_timm.ops.gpu import passes
from ema_timm.ops.operators import closed_form_operator
from ema_timm.ops.reference import reference
from ema_timm.ops.weights import EPS, EmaWeights

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")

needs_native = pytest.mark.skipif(
    library.library() is None, reason=f"no native kernel: {library.status()}"
)


FORMS = {
    "traceable": closed_form,
    "exported": closed_form_exported,
    "operators": closed_form_eager,
    "native": closed_form_eager,
    "custom operator": closed_form_operator,
    "passes": closed_form_eager,
}


@pytest.fixture(
    params=[
        "traceable",
        "exported",
        "operators",
        pytest.param("native", marks=needs_native),
        "custom operator",
        "passes",
    ]
)
def form(request, monkeypatch):
    if request.param == "passes":  # what runs on CUDA, here on the CPU
        monkeypatch.setattr(passes, "takes", lambda x: x.numel() > 0)
    if request.param == "operators":
        monkeypatch.setattr(native, "takes", lambda *_: False)
    return FORMS[request.param]


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    groups = draw(st.integers(1, 6))
    n = draw(st.integers(1, 9))
    batch = draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 19))
    return oracle.make_case(
        (batch, groups * n, height, width),
        groups,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 10_000)),
    )


@given(case=cases())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_output_and_every_gradient_equal_the_definition(form, case):
    names = ("out", *oracle.NAMES)
    if passes.takes(case.x) and case.x.element_size() == 2:
        # Its maps between two passes are in half precision, as those of library layers are: on tiny
        # maps, where a parameter's gradient may cancel, that shows. gpu/test_passes.py measures it.
        names = ("out", "x")
    oracle.assert_matches(form, case, names=names)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 128, 28, 28), (3, 512, 7, 7), (1, 64, 40, 65)])
def test_output_and_every_gradient_equal_the_definition_at_real_sizes(form, shape, layout):
    oracle.assert_matches(form, oracle.make_case(shape, 8, torch.float32, layout))


# The four identities of the derivation.


def test_identity_a_the_normed_branch_votes_with_softmax_of_beta():
    w = oracle.make_weights(5)
    y = torch.randn(3, 5, 6, 7, dtype=torch.double)
    pooled = F.group_norm(y, 5, w.gn_weight, w.gn_bias, EPS).mean((2, 3))
    torch.testing.assert_close(
        pooled.softmax(1), constant_channel_weights(w.gn_bias).expand(3, 5), rtol=0, atol=1e-12
    )


def test_identity_b_the_convolution_collapses_to_one_channel():
    w = oracle.make_weights(5)
    g = torch.randn(2, 3, 5, 6, 7, dtype=torch.double)
    v = w.gn_bias.softmax(0)
    whole = F.conv2d(g.flatten(0, 1), w.conv3x3_weight, w.conv3x3_bias, padding=1)
    whole = (whole * v[:, None, None]).sum(1).view(2, 3, 6, 7)
    found = convolve_to_one_channel(g, collapsed_kernel(w.conv3x3_weight, w.gn_bias))
    torch.testing.assert_close(found + v @ w.conv3x3_bias, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 7), (1, 7), (6, 1), (1, 1), (2, 2)])
def test_identity_c_pooled_convolution_is_linear_in_nine_means(size):
    w = oracle.make_weights(5)
    g = torch.randn(3, 5, *size, dtype=torch.double)
    whole = F.conv2d(g, w.conv3x3_weight, padding=1).mean((2, 3))
    means = shifted_means(g, g.mean(3), g.mean(2))
    found = torch.einsum("oit,bit->bo", w.conv3x3_weight.flatten(2), means)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_identity_d_the_norm_folds_into_one_coefficient_a_channel():
    w = oracle.make_weights(5)
    y = torch.randn(3, 5, 6, 7, dtype=torch.double)
    u = torch.randn(3, 5, dtype=torch.double).softmax(1)[:, :, None, None]
    whole = (u * F.group_norm(y, 5, w.gn_weight, w.gn_bias, EPS)).sum(1)
    mean = y.mean((2, 3), keepdim=True)
    r = (y.var((2, 3), correction=0, keepdim=True) + EPS).rsqrt()
    gamma, beta = w.gn_weight[:, None, None], w.gn_bias[:, None, None]
    found = (u * gamma * r * (y - mean)).sum(1) + (u * beta).sum(1)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


# Derivatives.


@pytest.mark.parametrize("size", [(3, 4), (1, 3), (3, 1)])
def test_gradcheck_and_gradgradcheck(size):
    case = oracle.make_case((2, 4, *size), 2, torch.float64)

    def function(x, *weights):
        return closed_form_eager(x, EmaWeights(*weights), 2)

    inputs = (case.x, *case.weights)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_double_backward_through_a_layer_used_twice():
    case = oracle.make_case((1, 4, 3, 4), 2, torch.float64)

    def penalty(function):
        out = function(function(case.x, case.weights, 2), case.weights, 2)
        first = torch.autograd.grad(out.square().sum(), case.x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [case.x, *case.weights])

    torch.testing.assert_close(penalty(closed_form_eager), penalty(reference))


@pytest.mark.parametrize("wanted", [{"x"}, {"conv3x3_weight"}, {"gn_bias", "conv1x1_bias"}])
def test_gradients_are_none_where_not_wanted(form, wanted):
    case = oracle.make_case((2, 8, 5, 6), 2)
    x = case.x.detach().requires_grad_("x" in wanted)
    weights = EmaWeights(
        *[
            w.detach().requires_grad_(name in wanted)
            for name, w in zip(EmaWeights._fields, case.weights, strict=True)
        ]
    )
    form(x, weights, 2).backward(case.grad)
    truth = oracle.expected(case)
    for name, leaf in zip(oracle.NAMES, (x, *weights), strict=True):
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert oracle.relative_error(leaf.grad, truth[name]) < 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_function_transforms_and_forward_mode():
    torch.manual_seed(0)
    layer = EmaAttn(8, groups=2).double()
    x = torch.randn(3, 2, 8, 4, 5, dtype=torch.double)

    def loss(x):
        return layer(x).square().sum()

    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(t) for t in x]))
    leaf = x[0].clone().requires_grad_()
    plain = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), plain)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x)[0], plain)
    tangent = torch.randn_like(x[0])
    slope = (plain * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x[0],), (tangent,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], tangent)
        out = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(out, slope)


# What callers rely on.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_owns_its_memory_and_the_input_stays(form, dtype, layout):
    case = oracle.make_case((2, 16, 5, 6), 4, dtype, layout)
    before = case.x.detach().clone()
    out = form(case.x, case.weights, 4)
    assert out.stride() == case.x.stride()
    assert not out._is_view()
    seen = []
    out.register_hook(seen.append)
    out += case.x  # what ResNet does with the shortcut
    out.relu_().sum().backward()
    assert len(seen) == 1
    assert torch.equal(case.x, before)
    assert case.x.grad.stride() == case.x.stride()


def test_an_empty_batch_gives_an_empty_map_and_zero_gradients(form):
    case = oracle.make_case((0, 8, 5, 6), 2)
    out = form(case.x, case.weights, 2)
    out.sum().backward()
    assert out.shape == case.x.shape
    assert not any(w.grad.any() for w in case.weights)


def test_an_expanded_gradient_is_read_by_its_strides(form):
    case = oracle.make_case((2, 8, 5, 6), 2)
    case = case._replace(grad=torch.ones(()).expand_as(case.x))
    oracle.assert_matches(form, case)


def test_parameters_changed_in_place_are_seen_at_once():
    layer, x = EmaAttn(8, groups=2).eval(), torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        first = layer(x)
        layer.conv3x3.weight.data.mul_(3)
        assert not torch.equal(layer(x), first)


def test_two_runs_are_bit_equal(form):
    case = oracle.make_case((4, 64, 14, 14), 8)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [oracle.output_and_gradients(form, case) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("chunk", [1, 1 << 40])
def test_the_size_of_chunks_changes_nothing(chunk, layout, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda *_: False)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    oracle.assert_matches(closed_form_eager, oracle.make_case((3, 12, 5, 6), 4, layout=layout))


# Memory.


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((1, 256, 56, 56), 0.25),
        ((1, 512, 28, 28), 0.30),
        ((1, 1024, 14, 14), 0.45),
        ((1, 2048, 7, 7), 0.9),
    ],
)
@pytest.mark.parametrize("built", [False, pytest.param(True, marks=needs_native)])
def test_saved_for_backward_beyond_the_input(shape, share, built, monkeypatch):
    if not built:
        monkeypatch.setattr(native, "takes", lambda *_: False)
    layer, x = EmaAttn(shape[1]), torch.randn(shape, requires_grad=True)
    kept = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert 0 < kept <= share * x.nbytes


@pytest.mark.parametrize("built", [False, pytest.param(True, marks=needs_native)])
def test_inference_holds_at_most_two_temporaries_of_the_inputs_size(built, monkeypatch):
    if not built:
        monkeypatch.setattr(native, "takes", lambda *_: False)
    layer, x = EmaAttn(256), torch.randn(4, 256, 56, 56)

    @torch.no_grad()
    def call():
        return layer(x)

    assert x.nbytes <= peak_extra_bytes(call, x.device) <= 3 * x.nbytes  # with the output


# Numbers that are hard on float32. "As good as" means within twice the authors' own error.


def authors_form(x, w, groups):
    layer = AuthorsEmaAttn(x.shape[1], groups=groups)
    names = [name for name, _ in layer.named_parameters()]
    return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))


HARD = {
    "far from zero": lambda z: 1000 + z,
    "large": lambda z: 1e4 * z,
    "constant channels": lambda z: z[..., :1, :1].expand_as(z).contiguous() * 100,
    "denormal": lambda z: 1e-40 * z,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_numbers_are_no_worse_than_the_authors_form(form, kind):
    total = {"ours": 0.0, "authors": 0.0}
    # Both forms round by chance; the largest errors of single inputs scatter threefold.
    for seed in range(16):
        torch.manual_seed(seed)
        x = HARD[kind](torch.randn(2, 64, 14, 14, dtype=torch.double)).float()
        w = oracle.make_weights(8, torch.float32, seed)
        wide = EmaWeights(*[t.detach().double() for t in w])
        with torch.no_grad():
            truth = reference(x.double(), wide, 8)
            found = {"ours": form(x, w, 8), "authors": authors_form(x, w, 8)}
        assert found["ours"].isfinite().all()
        for name, out in found.items():
            total[name] += (out.double() - truth).abs().max().item()
    assert total["ours"] <= 2 * total["authors"]


@pytest.mark.parametrize("kind", HARD)
def test_gradients_of_hard_numbers_are_finite(form, kind):
    case = oracle.make_case((2, 16, 6, 7), 2)
    case = case._replace(x=HARD[kind](case.x.detach()).requires_grad_())
    for name, value in oracle.output_and_gradients(form, case).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("kind", ["far from zero", "constant channels"])
def test_gradients_of_hard_numbers_are_no_worse_than_the_authors_form(form, kind):
    total = {"ours": 0.0, "authors": 0.0}
    for seed in range(8):
        case = oracle.make_case((2, 16, 14, 14), 2, seed=seed)
        case = case._replace(x=HARD[kind](case.x.detach()).requires_grad_())
        truth = oracle.expected(case)
        for name, function in (("ours", form), ("authors", authors_form)):
            found = oracle.output_and_gradients(function, case)
            total[name] += oracle.relative_error(found["gn_weight"], truth["gn_weight"], 1.0)
            total[name] += oracle.relative_error(found["x"], truth["x"])
    assert total["ours"] <= 2 * total["authors"]


def test_half_precision_keeps_statistics_in_float32(form):
    case = oracle.make_case((1, 16, 12, 12), 2, torch.float16)
    case = case._replace(x=(case.x.detach() * 1e4).clamp(-6e4, 6e4).requires_grad_())
    truth = reference(*oracle.widened(case)[:3])
    with torch.autocast("cpu", torch.bfloat16):
        out = ema_attention(case.x, case.weights, 2)
    for found in (out, form(*case[:3])):
        assert found.dtype == torch.float16
        assert oracle.relative_error(found.detach(), truth) < oracle.TOLERANCES[torch.float16]


# Everything that traces.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_whole_with_dynamic_shapes(layout):
    torch._dynamo.reset()
    layer = EmaAttn(16, groups=4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for shape in ((2, 16, 5, 6), (3, 16, 8, 7)):
        case = oracle.make_case(shape, 4, torch.float32, layout)
        with torch.no_grad():
            for p, w in zip(layer.parameters(), case.weights, strict=True):
                p.copy_(w)
        out = compiled(case.x)
        assert out.stride() == case.x.stride()
        found = torch.autograd.grad(out, [case.x, *layer.parameters()], case.grad)
        truth = oracle.expected(case)
        for name, value in zip(oracle.NAMES, found, strict=True):
            assert oracle.relative_error(value, truth[name]) < 1e-4, name
        with torch.no_grad():
            torch.testing.assert_close(compiled(case.x), out.detach())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_custom_operator_passes_pytorchs_own_checks():
    case = oracle.make_case((2, 8, 5, 6), 2)
    torch.library.opcheck(torch.ops.ema_timm.closed_form, (case.x, *case.weights, 2, True))


def others():
    torch.manual_seed(0)
    return EmaAttn(16, groups=4), torch.randn(2, 16, 6, 7), torch.randn(3, 16, 9, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["script", "trace", "fx", "export", "deepcopy"])
def test_traces_and_runs_at_another_size(way):
    layer, x, other = others()
    names = {0: "b", 2: "h", 3: "w"}  # PyTorch 2.5 wants its sizes bounded
    dims = ({axis: torch.export.Dim(name, max=4096) for axis, name in names.items()},)
    traced = {
        "script": lambda: torch.jit.script(layer),
        "trace": lambda: torch.jit.trace(layer, x),
        "fx": lambda: torch.fx.symbolic_trace(layer),
        "export": lambda: torch.export.export(layer, (x,), dynamic_shapes=dims).module(),
        "deepcopy": lambda: copy.deepcopy(layer),
    }[way]()
    torch.testing.assert_close(traced(other), layer(other), rtol=1e-4, atol=1e-5)


def test_exported_program_holds_pytorch_operators_only():
    layer, x, _ = others()
    for strict in (False, True):
        graph = torch.export.export(layer, (x,), strict=strict).graph
        assert not [n for n in graph.nodes if "ema_timm" in str(n.target)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_exports_to_onnx_with_dynamic_sizes(dynamo, tmp_path):
    layer, x, other = others()
    write_onnx(layer, x, tmp_path / "m.onnx", "dynamo" if dynamo else "legacy")
    run = open_onnx(tmp_path / "m.onnx")
    for size in (x, other, x[:1, :, :, :1]):
        torch.testing.assert_close(run(size), layer(size), rtol=1e-4, atol=1e-5)


# What runtimes get.

WAYS = [(dialect, small) for dialect in DIALECTS for small in (False, True)]
WAYS.remove(("delegate", True))


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}, small" if way[1] else way[0])
def runtime_form(request):
    name, small = request.param
    dialect = DIALECTS[name]()

    def form(x, weights, groups):
        kind, matrices = torch.promote_types(x.dtype, torch.float32), None
        if small:
            matrices = SmallMap(*[m.to(kind) for m in small_map(*x.shape[2:])])
        arranged = arrange(fold(statistics_type(x, weights)))
        if name == "delegate":
            return dialect(x.to(kind), Delegate.arranged(arranged), groups).to(x.dtype)
        return dialect(x, arranged, groups, matrices)

    return form


@pytest.mark.parametrize("size", [(7, 7), (5, 8), (1, 6), (6, 1), (2, 2)])
def test_every_dialect_is_the_definition(runtime_form, size):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = oracle.make_case((3, 24, *size), 4, dtype)
        truth = reference(*oracle.widened(case)[:3])
        with torch.no_grad():
            out = runtime_form(case.x, case.weights, 4)
        assert out.dtype == dtype
        assert oracle.relative_error(out, truth) < oracle.TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(1, 256, 14, 14), (2, 512, 7, 7), (1, 64, 28, 28)])
def test_every_dialect_is_exact_to_five_tenths_of_a_millionth(runtime_form, shape):
    case = oracle.make_case(shape, 32)
    with torch.no_grad():
        out = runtime_form(case.x, case.weights, 32)
    assert oracle.relative_error(out, reference(*oracle.widened(case)[:3])) < 5e-7


@pytest.mark.parametrize("kind", HARD)
def test_hard_numbers_in_runtimes_are_no_worse_than_the_authors_form(runtime_form, kind):
    test_hard_numbers_are_no_worse_than_the_authors_form(runtime_form, kind)


@pytest.mark.parametrize("name", DIALECTS)
def test_edge_features_and_arranged_votes_are_the_shifted_means(name):
    w = fold(oracle.make_weights(5))
    g = torch.randn(3, 5, 6, 7, dtype=torch.double)
    means = shifted_means(g, g.mean(3), g.mean(2)).flatten(1)
    features = DIALECTS[name]()._edges(g, g.mean(2, keepdim=True), Shape(1, 5, 6, 7, True))
    by_matrix = (g.flatten(2) @ small_map(6, 7).pool)[:, :, 13:].flatten(1)
    for found in (features, by_matrix):
        votes = found @ arrange(w).vote_weight
        torch.testing.assert_close(votes, means @ w.vote_weight.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_layer_keeps_to_what_ncnn_supports():
    """At most four dimensions, no slices with a step, no norm of three dimensions."""
    layer, x, _ = others()
    nodes = list(torch.jit.trace(layer, x).inlined_graph.nodes())
    kinds = [value.type() for node in nodes for value in node.outputs()]
    assert max(len(k.sizes() or ()) for k in kinds if k.kind() == "TensorType") == 4
    steps = [list(node.inputs())[4] for node in nodes if node.kind() == "aten::slice"]
    assert steps and {step.toIValue() for step in steps} == {1}
    assert not {node.kind() for node in nodes} & {"aten::instance_norm", "aten::group_norm"}


def test_a_layer_exported_as_it_is_gets_the_dialect_of_its_exporter(monkeypatch):
    case = oracle.make_case((2, 16, 5, 6), 4)
    arranged = arrange(fold(case.weights))
    for for_onnx, dialect in ((False, Plain()), (True, Onnx())):
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda answer=for_onnx: answer)
        found = closed_form_exported(*case[:3])
        torch.testing.assert_close(found, dialect(case.x, arranged, 4), rtol=0, atol=0)


# The native kernel.


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_kernel_is_right_at_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        oracle.assert_matches(closed_form_eager, oracle.make_case((1, 40, 9, 11), 5))
    finally:
        torch.set_num_threads(before)


def test_a_missing_native_kernel_is_said_once(monkeypatch, caplog):
    monkeypatch.setenv("EMA_TIMM_NATIVE", "0")
    caches = (library.library, library.has_float16, library._find, native._dtypes)
    for cached in caches:
        cached.cache_clear()
    try:
        case = oracle.make_case((1, 8, 3, 4), 2)
        for _ in range(2):
            oracle.assert_matches(closed_form_eager, case)
        assert len([r for r in caplog.records if "EMA_TIMM_NATIVE" in r.message]) == 1
        assert "switched off" in library.status()
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


def test_fold_is_differentiable():
    weights = oracle.make_weights(3)

    def function(*weights):
        return tuple(fold(EmaWeights(*weights)))

    assert torch.autograd.gradcheck(function, tuple(weights))


# What Inductor fuses on a GPU.


@pytest.mark.parametrize("size", [(6, 7), (1, 7), (6, 1), (1, 1)])
def test_taps_as_sums_are_taps_as_a_product(size):
    case = oracle.make_case((2, 12, *size), 4, torch.float64)
    found = [
        oracle.output_and_gradients(functools.partial(closed_form, for_inductor=way), case)
        for way in (True, False)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-9)


def test_on_a_gpu_inductor_gets_no_product_with_the_map():
    """As traced for CUDA: the products that are left are those of pools, votes and parameters."""
    with FakeTensorMode():
        x = torch.empty(2, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
        weights = EmaWeights(*[w.detach() for w in oracle.make_weights(8, torch.float32)])
        weights = EmaWeights(*[torch.empty_like(w, device="cuda") for w in weights])
        graph = make_fx(lambda x, *w: closed_form(x, EmaWeights(*w), 8, True))(x, *weights)
    for node in graph.graph.nodes:
        name = str(node.target)
        if "mm" in name or "matmul" in name or "convolution" in name:
            assert all(a.meta["val"].numel() < x.numel() / 8 for a in node.all_input_nodes), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [True, None])
def test_other_sizes_are_not_compiled_anew(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weights = oracle.make_weights(4, torch.float32)
    compiled = torch.compile(
        lambda x: closed_form(x, weights, 4, True), backend=counter, dynamic=dynamic
    )
    for size in ((6, 7), (9, 5), (12, 16), (7, 7), (20, 3)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(compiled(x), closed_form(x, weights, 4), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == (1 if dynamic else 2)  # the second size tells what varies


@pytest.mark.filterwarnings("ignore")
def test_folding_is_made_of_sums():
    """Over a vector times a matrix fvcore and Core ML stumble; matrices may round to TF32."""

    def function(*weights):
        return tuple(fold(EmaWeights(*weights)))

    weights = tuple(w.detach() for w in oracle.make_weights(3))
    graph = torch.jit.trace(function, weights).graph
    kinds = {"aten::mm", "aten::mv", "aten::matmul", "aten::dot"}
    assert not kinds & {node.kind() for node in graph.nodes()}
