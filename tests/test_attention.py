"""The layer: equal to the definition everywhere, and as well-behaved as a layer can be."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from ema_timm import EmaAttn, ema_attention
from ema_timm.attention import largest_group_count
from ema_timm.integrations.yolo import EmaAttnRow

SHAPES = {
    "square": (2, 64, 32, 7, 7),
    "wide": (2, 48, 8, 3, 10),
    "odd": (1, 24, 4, 5, 9),
    "one row": (2, 16, 4, 1, 6),
    "one column": (2, 16, 4, 6, 1),
    "one pixel": (3, 16, 4, 1, 1),
    "one pixel, one group, one image": (1, 8, 1, 1, 1),
    "one channel a group": (2, 8, 8, 4, 5),
    "one group": (2, 12, 1, 4, 4),
    "no image": (0, 16, 4, 4, 4),
}


def random_layer(channels, groups, dtype=torch.float64):
    layer = EmaAttn(channels, groups=groups, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def outputs_and_gradients(layer, impl, x, upstream):
    layer.impl = impl
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    inputs = [x, *layer.parameters()]
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("case", SHAPES)
def test_closed_form_equals_the_definition(case, layout):
    batch, channels, groups, height, width = SHAPES[case]
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(batch, channels, height, 2 * width, dtype=torch.float64)[..., ::2]
    elif layout == "expanded":
        x = x[:, :, :, :1].expand(-1, -1, -1, width)
    layer = random_layer(channels, groups)
    upstream = torch.randn_like(x)
    wanted = outputs_and_gradients(layer, "reference", x, upstream)
    found = outputs_and_gradients(layer, "closed_form", x, upstream)
    for want, got in zip(wanted, found, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "closed_form"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_keeps_dtype_and_memory_format_and_owns_its_memory(dtype, memory_format, impl):
    layer = EmaAttn(32, groups=8, dtype=dtype)
    layer.impl = impl
    x = torch.randn(2, 32, 5, 6).to(dtype).to(memory_format=memory_format).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert not out._is_view()
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


def test_state_dict_keys_are_those_of_the_authors_module():
    layer = EmaAttn(64)
    expected = [f"{m}.{p}" for m in ("conv1x1", "conv3x3", "gn") for p in ("weight", "bias")]
    assert list(layer.state_dict()) == expected
    n = 2
    theirs = nn.ModuleDict(
        {
            "conv1x1": nn.Conv2d(n, n, 1),
            "conv3x3": nn.Conv2d(n, n, 3, padding=1),
            "gn": nn.GroupNorm(n, n),
        }
    )
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in layer.parameters()) == 10 * n * n + 4 * n


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: EmaAttn(64, groups=0), ValueError, "groups must be at least 1, got 0"),
        (lambda: EmaAttn(64, groups=-4), ValueError, "groups must be at least 1, got -4"),
        (lambda: EmaAttn(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: EmaAttn(64.0), TypeError, "channels must be an int, got 64.0"),
        (lambda: EmaAttn(64, groups=True), TypeError, "groups must be an int, got True"),
        (lambda: EmaAttn(64, rd_ratio=0.5), TypeError, "rd_ratio"),
        (lambda: EmaAttn(64)(torch.randn(64, 7, 7)), ValueError, r"4 dimensions.*unsqueeze"),
        (lambda: EmaAttn(64)(torch.randn(2, 49, 64)), ValueError, r"\(2, 49, 64\)"),
        (lambda: EmaAttn(64)(torch.ones(1, 64, 3, 3).int()), TypeError, r"torch.int32.*float\(\)"),
        (lambda: EmaAttn(64)(torch.ones(1, 64, 3, 3).cfloat()), TypeError, "torch.complex64"),
        (lambda: EmaAttn(64)(torch.randn(1, 32, 3, 3)), ValueError, r"64 channels.*EmaAttn\(32\)"),
        (lambda: EmaAttn(64)(torch.randn(1, 64, 0, 3)), ValueError, "at least 1"),
        (lambda: call_with(impl="fast"), ValueError, "impl must be .*'closed_form'.*'fast'"),
        (lambda: call_with(groups=0), ValueError, "groups must be at least 1"),
        (lambda: call_with(groups=2.0), TypeError, "groups must be an int"),
    ],
)
def test_bad_input_is_refused_with_the_rule_what_came_and_the_remedy(call, error, said):
    with pytest.raises(error, match=said):
        call()


def call_with(groups=4, impl="auto"):
    return ema_attention(torch.randn(1, 16, 3, 3), EmaAttn(16, groups=4).weights(), groups, impl)


@pytest.mark.parametrize("impl", ["reference", "closed_form"])
class TestConsumersRelyOn:
    """Layer behaviours that networks, hooks and tools around them rely on."""

    @pytest.fixture
    def layer(self, impl):
        layer = random_layer(16, 4)
        layer.impl = impl
        return layer

    def test_output_may_be_changed_in_place(self, layer):
        x = torch.randn(2, 16, 4, 5, dtype=torch.float64, requires_grad=True)
        seen = []
        out = layer(x)
        out.register_hook(seen.append)
        out += x
        out.relu_()
        (got,) = torch.autograd.grad(out.square().sum(), x)
        y = x.detach().requires_grad_()
        (want,) = torch.autograd.grad((layer(y) + y).relu().square().sum(), y)
        torch.testing.assert_close(got, want)
        assert len(seen) == 1

    def test_may_be_used_twice_in_one_graph(self, layer):
        x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
        both = torch.autograd.grad(layer(layer(x)).sum(), [x, *layer.parameters()])
        twin = copy.deepcopy(layer)
        apart = torch.autograd.grad(
            twin(layer(x)).sum(), [x, *layer.parameters(), *twin.parameters()]
        )
        count = len(list(layer.parameters()))
        torch.testing.assert_close(both[0], apart[0])
        for i in range(count):
            torch.testing.assert_close(both[1 + i], apart[1 + i] + apart[1 + count + i])

    @pytest.mark.parametrize("frozen", ["conv1x1", "conv3x3", "gn"])
    def test_some_parameters_may_be_frozen(self, layer, frozen):
        getattr(layer, frozen).requires_grad_(False)
        x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
        layer(x).sum().backward()
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen), name

    def test_gradient_of_the_input_alone(self, layer):
        layer.requires_grad_(False)
        x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None

    def test_no_graph_without_gradients(self, layer):
        layer.requires_grad_(False)
        assert layer(torch.randn(1, 16, 3, 4, dtype=torch.float64)).grad_fn is None

    @pytest.mark.parametrize(
        "name", [f"{m}.{p}" for m in ("conv1x1", "conv3x3", "gn") for p in ("weight", "bias")]
    )
    def test_updates_of_parameters_are_seen_at_once(self, layer, name):
        layer.eval()
        x = torch.randn(1, 16, 5, 4, dtype=torch.float64)
        before = layer(x)
        parameter = layer.get_parameter(name)
        parameter.data += torch.randn_like(parameter)
        through_data = layer(x)
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
        in_place = layer(x)
        assert not torch.equal(before, through_data)
        assert not torch.equal(through_data, in_place)

    def test_input_is_not_modified(self, layer):
        x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
        kept = x.detach().clone()
        layer(x).sum().backward()
        assert torch.equal(x, kept)

    def test_copies_and_pickles(self, layer):
        x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))

    def test_dtype_round_trip(self, layer):
        layer = layer.float()
        x = torch.randn(1, 16, 3, 4)
        before = layer(x)
        assert torch.equal(layer.double().float()(x), before)

    def test_statistics_in_float32_under_autocast(self, layer):
        layer = layer.float()
        x = torch.randn(2, 16, 6, 6) + 100
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer(x))
            under = layer(x)
        assert under.dtype == torch.float32
        assert torch.equal(under, layer(x))


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_device_and_dtype_construction(where):
    layer = EmaAttn(64, device=where, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(where, torch.bfloat16)}
    x = torch.randn(2, 64, 4, 4, device=where, dtype=torch.bfloat16)
    assert layer(x).shape == x.shape


def test_repr_names_channels_and_groups():
    assert "channels=64, groups=16" in repr(EmaAttn(64, groups=16))


def test_builds_as_timm_attention_layer():
    model = timm.create_model("resnet18", block_args={"attn_layer": EmaAttn})
    assert isinstance(model.layer1[0].se, EmaAttn)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit announces its own end
class TestTracing:
    def setup_method(self):
        self.layer = EmaAttn(32, groups=8)
        self.small, self.large = torch.randn(1, 32, 3, 5), torch.randn(2, 32, 8, 6)

    def check(self, traced):
        for x in (self.small, self.large):
            torch.testing.assert_close(traced(x), self.layer(x))

    def test_torchscript(self):
        scripted = torch.jit.script(self.layer)
        saved = io.BytesIO()
        torch.jit.save(scripted, saved)
        saved.seek(0)
        self.check(torch.jit.load(saved))

    def test_torchscript_of_a_row_of_yolo(self):
        self.layer = EmaAttnRow(32, 8, gain=2)
        self.check(torch.jit.script(self.layer))

    def test_jit_trace_burns_no_size_in(self):
        self.check(torch.jit.trace(self.layer, self.small))

    def test_fx(self):
        self.check(torch.fx.symbolic_trace(self.layer))

    def test_export_with_dynamic_shape(self):
        auto = torch.export.Dim.AUTO
        program = torch.export.export(
            self.layer, (self.large,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
        )
        self.check(program.module())


@pytest.mark.parametrize(
    ("channels", "at_most", "groups"),
    [
        (64, 32, 32),
        (2048, 32, 32),
        (48, 32, 24),
        (432, 32, 27),
        (7, 32, 7),
        (37, 32, 1),
        (64, 7, 4),
    ],
)
def test_group_rule_is_the_largest_divisor_not_above(channels, at_most, groups):
    assert largest_group_count(channels, at_most) == groups
