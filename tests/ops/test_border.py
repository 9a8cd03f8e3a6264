"""What reaches the C kernel, or PyTorch's operators, or an error: tensors that are not plain."""

import pytest
import torch
from support import oracle
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ema_timm.attention import EmaAttn
from ema_timm.ops import ema_attention
from ema_timm.ops.cpu import native
from ema_timm.ops.formula import closed_form
from ema_timm.ops.weights import EmaWeights

SHAPE = (2, 16, 5, 6)
NAMES = EmaWeights._fields


def layer_and_input(**options):
    torch.manual_seed(0)
    layer = EmaAttn(16, groups=2, **options)
    with torch.no_grad():
        for p, w in zip(layer.parameters(), oracle.make_weights(8, torch.float32), strict=True):
            p.copy_(w)
    return layer, torch.randn(SHAPE)


def truth(layer, x):
    wide = EmaWeights(*[w.detach().double() for w in layer.weights()])
    return closed_form(x.detach().double(), wide, layer.groups)


def assert_right(out, layer, x):
    assert oracle.relative_error(out.detach(), truth(layer, x)) < oracle.TOLERANCES[x.dtype]


grad_modes = pytest.mark.parametrize("grad", [True, False])


# Weights that are elsewhere.


@grad_modes
def test_weights_on_another_device_end_in_pytorchs_error(grad):
    layer = EmaAttn(16, groups=2, device="meta")
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"device|meta"):
        layer(torch.randn(SHAPE))


def test_the_operator_refuses_weights_on_another_device():
    from ema_timm.ops.operators import closed_form_operator

    weights = EmaAttn(16, groups=2, device="meta").weights()
    with pytest.raises(RuntimeError, match="on one device"):
        closed_form_operator(torch.randn(SHAPE), weights, 2)


@grad_modes
def test_fake_weights_end_in_pytorchs_error(grad):
    with FakeTensorMode():
        layer = EmaAttn(16, groups=2)
    assert isinstance(layer.gn.weight, FakeTensor)
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match="FakeTensor"):
        layer(torch.randn(SHAPE))


@grad_modes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_distributed_weights_end_in_pytorchs_error(grad):
    from torch.distributed.tensor import distribute_module, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = distribute_module(EmaAttn(16, groups=2), init_device_mesh("cpu", (1,)))
        # PyTorch 2.5 ends in an IndexError of its own planner.
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, IndexError)) as found:
            layer(torch.randn(SHAPE))
        assert found.type is IndexError or "DTensor" in str(found.value)
    finally:
        torch.distributed.destroy_process_group()


@grad_modes
def test_a_fake_mode_that_takes_real_tensors_gives_a_fake_map(grad):
    layer, x = layer_and_input()
    x.requires_grad_(grad)
    real = layer(x)
    with torch.set_grad_enabled(grad), FakeTensorMode(allow_non_fake_inputs=True):
        out = layer(x)
        assert isinstance(out, FakeTensor)
        assert out.shape == x.shape
        if grad:
            found = torch.autograd.grad(real, [x, *layer.parameters()], torch.ones_like(x))
            assert all(isinstance(t, FakeTensor) for t in found)


# Tensors without memory.


@grad_modes
def test_a_zero_tensor_is_a_map_of_zeros(grad):
    layer, _ = layer_and_input()
    zeros = torch._efficientzerotensor(SHAPE)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(zeros), torch.zeros(SHAPE))


def test_a_zero_gradient_gives_zeros():
    layer, x = layer_and_input()
    out = layer(x.requires_grad_())
    found = torch.autograd.grad(
        out, [x, *layer.parameters()], torch._efficientzerotensor(SHAPE), materialize_grads=True
    )
    assert not any(t.any() for t in found)


# PyTorch's own operators read freed memory; only what reaches the C kernel is checked.
checks_memory = pytest.mark.skipif(native.library() is None, reason="no native kernel")


@checks_memory
@grad_modes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", ["x", "gn_weight"])
def test_freed_memory_is_an_error(name, offset, grad):
    layer, x = layer_and_input()
    case = {"x": x, **layer.weights()._asdict()}
    held = torch.zeros(offset + case[name].numel())
    case[name] = held[offset:].view(case[name].shape)
    held.untyped_storage().resize_(0)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="was freed"):
        ema_attention(case.pop("x"), EmaWeights(**case), layer.groups)


@checks_memory
def test_freed_memory_in_the_backward_is_an_error():
    layer, x = layer_and_input()
    out = layer(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was freed"):
        out.sum().backward()


# Weights of another shape.


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_shape_are_refused(name, impl):
    layer, x = layer_and_input()
    weights = layer.weights()
    good = getattr(weights, name)
    for shape in [(1,), (7, *good.shape[1:]), (9, *good.shape[1:]), (*good.shape, 1), (4, 2), ()]:
        other = weights._replace(**{name: torch.zeros(shape)})
        with pytest.raises(ValueError, match=rf"weights.*got.*\({', '.join(map(str, shape))}"):
            ema_attention(x, other, 2, impl)


@pytest.mark.parametrize("name", EmaAttn(16, groups=2).gn.state_dict())
def test_a_layer_with_a_parameter_of_another_width_is_refused(name):
    layer, x = layer_and_input()
    setattr(layer.gn, name, torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"\(3,\)|of 3"):
        layer(x)


def test_the_operator_called_by_itself_refuses_weights_of_another_size():
    from ema_timm.ops import operators  # noqa: F401, registers the operator

    layer, x = layer_and_input()
    weights = layer.weights()._replace(gn_weight=torch.zeros(3))
    with pytest.raises((ValueError, RuntimeError), match=r"weights|size"):
        torch.ops.ema_timm.closed_form(x, *weights, 2, False)


# Weights whose numbers are not those at their pointer.


def negative(tensor):
    """Equal to ``tensor``, with the negative bit: the memory holds the other sign."""
    found = torch._neg_view(-tensor)
    assert found.is_neg()
    assert torch.equal(found, tensor)
    return found


@grad_modes
@pytest.mark.parametrize("name", ["x", *NAMES])
def test_the_negative_bit_is_seen(name, grad):
    case = oracle.make_case(SHAPE, 2)
    given = {"x": case.x, **case.weights._asdict()}
    given[name] = negative(given[name].detach()).requires_grad_(grad)
    bare = given.pop("x"), EmaWeights(**given)
    if grad:
        oracle.assert_matches(
            lambda *_: ema_attention(*bare, 2), case._replace(x=bare[0], weights=bare[1])
        )
    else:
        with torch.no_grad():
            found = ema_attention(*bare, 2)
        assert oracle.relative_error(found, oracle.expected(case)["out"]) < 1e-4


# Graphs taken from real tensors.


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_of_real_tensors_computes(pre_dispatch):
    layer, x = layer_and_input()
    layer.requires_grad_(False)
    graph = make_fx(layer, tracing_mode="real", pre_dispatch=pre_dispatch)(x)
    other = torch.randn(SHAPE)
    assert_right(graph(other), layer, other)


def test_a_graph_of_the_backward_computes():
    layer, x = layer_and_input()
    leaves = [x.requires_grad_(), *layer.parameters()]

    def whole(grad):
        return torch.autograd.grad(layer(x), leaves, grad)

    out = layer(x)

    def backward_alone(grad):
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    other = torch.randn(SHAPE)
    for function in (whole, backward_alone):
        graph = make_fx(function, tracing_mode="real")(torch.randn(SHAPE))
        for found, wanted in zip(graph(other), function(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Hooks on saved tensors.


def strided(tensor):
    """Equal numbers in every other place."""
    held = tensor.new_full((*tensor.shape, 2), float("nan"))
    held[..., 0] = tensor
    return held[..., 0]


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize(
    ("unpack", "tolerance"),
    [(strided, 2e-4), (torch.Tensor.double, 2e-4), (torch.Tensor.bfloat16, 5e-2)],
    ids=["strides", "double", "bfloat16"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_tensors_in_another_form_give_the_same_gradients(unpack, tolerance, dtype, operator):
    from ema_timm.ops.operators import closed_form_operator

    case = oracle.make_case(SHAPE, 2, dtype)

    def function(x, weights, groups):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return (closed_form_operator if operator else ema_attention)(x, weights, groups)

    oracle.assert_matches(function, case, tolerance)


@pytest.mark.parametrize("which", range(10))
def test_a_saved_tensor_of_another_shape_is_refused(which):
    layer, x = layer_and_input()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index):
        tensor = packed[index]
        return tensor[:1] if index == which else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = layer(x.requires_grad_())
    assert len(packed) == 10
    with pytest.raises(RuntimeError, match="hook on saved tensors"):
        out.sum().backward()


# Many gradients at once.


def test_batched_gradients_equal_single_ones():
    layer, x = layer_and_input()
    leaves = [x.requires_grad_(), *layer.parameters()]
    grads = torch.randn(3, *SHAPE)
    out = layer(x)
    many = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for found, wanted in zip(many, one, strict=True):
            torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_vectorized_jacobian_equals_the_plain_one(create_graph):
    layer = EmaAttn(4, groups=2)
    x = torch.randn(1, 4, 2, 3)
    found, wanted = (
        torch.autograd.functional.jacobian(layer, x, create_graph, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_plain_tensors_still_take_the_kernel(monkeypatch):
    """None of the checks sends an ordinary call to the slower operators."""
    if native.library() is None:
        pytest.skip("no native kernel")
    calls = []
    for name in ("forward", "backward"):
        real = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    for channels in (16, 2):  # groups of several channels and of one
        layer = EmaAttn(channels, groups=2)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, channels, 5, 6, dtype=dtype, requires_grad=True)
            layer(x).sum().backward()
            layer(x.detach()[:, :, 1:, 1:])
            with torch.inference_mode():
                layer(torch.randn(2, channels, 5, 6, dtype=dtype))
    assert calls == ["forward", "backward", "forward", "forward"] * 4


def test_a_backward_inside_autocast_is_the_one_outside():
    """Products of weights in bfloat16 would reach C as if they were float32."""
    torch.manual_seed(0)
    layer, x = EmaAttn(16, groups=2), torch.randn(SHAPE, requires_grad=True)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(layer(x).square().sum(), leaves)
        compared = torch.autograd.grad(layer(x).square().sum(), leaves, create_graph=True)
    for a, b, c in zip(wanted, found, compared, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
