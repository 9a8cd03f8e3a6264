"""A layer whose own convolutions or norm are wrapped or hooked: it works as an SE layer does.

The oracle is the authors' code around the same children, in float64.
"""

import copy
import logging

import pytest
import torch
from timm.layers import SEModule
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from ema_timm import EmaAttn, children
from ema_timm.bench.authors_code import AuthorsEmaAttn
from ema_timm.export.layers import ready_to_export
from ema_timm.integrations.yolo import EmaAttnRow
from ema_timm.ops.parallel import parallel
from ema_timm.see import attention_maps

# Deprecated, and still what people use: torch.jit, weight_norm.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHAPE = (2, 16, 5, 6)


class Lora(nn.Module):
    """A low-rank adapter beside a frozen convolution, as peft makes one."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        like = {"padding": base.padding, "bias": False, "dtype": base.weight.dtype}
        self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, **like)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Conv2d):
    """A convolution with a forward of its own, such as one with fake quantisation."""

    def forward(self, x):
        return super().forward(x) / 2


def as_halved(child):
    child.__class__ = Halved


def as_replaced(child):
    """As accelerate replaces it, to fetch weights from elsewhere."""
    own = child.forward
    child.forward = lambda x: own(x) / 2


def pruned(child):
    prune.l1_unstructured(child, "weight", 0.5)


WRAPPED = {
    "lora": Lora,
    "prune": pruned,
    "weight_norm": lambda child: weight_norm(child) and None,
    "spectral_norm": lambda child: spectral_norm(child) and None,
    "parametrized": lambda child: parametrizations.weight_norm(child) and None,
    "forward hook": lambda child: child.register_forward_hook(lambda m, a, out: out / 2) and None,
    "input hook": lambda child: child.register_forward_pre_hook(lambda m, a: a[0] / 2) and None,
    "subclass": as_halved,
    "replaced forward": as_replaced,
}
CONTROL = {"ema": ("conv1x1", "conv3x3"), "se": ("fc1", "fc2")}


def make(kind="ema"):
    if kind == "se":
        return SEModule(16, rd_channels=4, act_layer="gelu").double()
    layer = EmaAttn(16, groups=4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def wrap(module, how, names):
    for name in names:
        child = WRAPPED[how](module.get_submodule(name))
        if child is not None:
            module.set_submodule(name, child)
    return module


def wrapped(how, kind="ema"):
    return wrap(make(kind), how, CONTROL[kind])


def authors(layer):
    """The authors' code around the children of ``layer``."""
    found = AuthorsEmaAttn(layer.channels, groups=layer.groups)
    for name, child in layer.named_children():
        found.set_submodule(name, child)
    return found


@pytest.mark.parametrize("kind", CONTROL)
@pytest.mark.parametrize("how", WRAPPED)
def test_everything_that_can_learn_learns_in_two_steps(how, kind):
    module = wrapped(how, kind)
    own = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in own]
    optimizer = torch.optim.SGD(own, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(SHAPE).double()).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
        optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(own, before, strict=True))


@pytest.mark.parametrize("how", WRAPPED)
def test_outputs_and_gradients_are_those_of_the_authors_code_around_the_same_children(how):
    layer = wrapped(how).eval()
    x = torch.randn(SHAPE).double().requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    outs = [layer(x), authors(layer)(x)]
    upstream = torch.randn_like(x)
    found, want = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in outs)
    for a, b in zip((outs[0], *found), (outs[1], *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", CONTROL)
def test_hooks_of_children_run_once_a_call(kind):
    module, ran = make(kind), []
    for name in CONTROL[kind]:
        child = module.get_submodule(name)
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
        child.register_full_backward_hook(lambda *_, name=name: ran.append(f"d {name}"))
    module(torch.randn(SHAPE).double().requires_grad_()).sum().backward()
    assert sorted(ran) == sorted([*CONTROL[kind], *(f"d {name}" for name in CONTROL[kind])])
    ran.clear()
    for name in CONTROL[kind]:
        module.get_submodule(name)._forward_hooks.clear()
        module.get_submodule(name)._backward_hooks.clear()
    module(torch.randn(SHAPE).double())
    assert not ran


def test_the_norm_counts_as_well():
    layer, ran = make(), []
    layer.gn.register_forward_hook(lambda *_: ran.append("gn"))
    layer(torch.randn(SHAPE).double())
    assert ran == ["gn"]


def test_merged_adapters_leave_the_same_layer():
    layer = wrapped("lora")
    x = torch.randn(SHAPE).double()
    want = layer(x)
    with torch.no_grad():
        for name in CONTROL["ema"]:
            lora = layer.get_submodule(name)
            change = torch.einsum("or,rihw->oihw", lora.up.weight[..., 0, 0], lora.down.weight)
            lora.base.weight += change
            layer.set_submodule(name, lora.base)
    assert children.plain_weights(layer) is not None
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


def test_without_cross_spatial_learning():
    layer = EmaAttn(16, groups=4, cross_spatial=False).double()
    x = torch.randn(SHAPE).double()
    want = parallel(x, layer.weights(), 4)
    layer.gn.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_type_and_layout(dtype, memory_format):
    layer = make()
    x = torch.randn(SHAPE).to(dtype).to(memory_format=memory_format).requires_grad_()
    low = copy.deepcopy(layer).to(dtype)
    want = copy.deepcopy(low).double()(x.double())
    low.conv3x3.register_forward_hook(lambda *_: None)
    out = low(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
    assert not out._is_view()
    assert (out.double() - want).abs().max() <= 0.1 * want.abs().max()
    with torch.autocast("cpu", dtype):
        layer.float().conv3x3.register_forward_hook(lambda *_: None)
        assert layer(x.float()).dtype == torch.float32


def test_subclasses_and_rows_of_yolo_too():
    row = EmaAttnRow(16, 4, gain=2).double()
    x = torch.randn(SHAPE).double()
    wrap(row, "forward hook", CONTROL["ema"])
    torch.testing.assert_close(row(x), 2 * authors(row)(x))


def test_it_is_logged_once(caplog):
    children._log_once.cache_clear()
    layers = [wrapped("prune") for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for layer in layers * 2:
            layer(torch.randn(SHAPE).double())
    (record,) = caplog.records
    assert "conv1x1 has a hook of torch.nn.utils.prune" in record.getMessage()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of every GroupNorm
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of every pruned convolution
@pytest.mark.parametrize("how", ["lora", "prune", "forward hook"])
def test_compiled_traced_and_exported_it_computes_the_same(how):
    layer, x = wrapped(how).eval(), torch.randn(SHAPE).double()
    want = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found in (
        compiled(x),
        torch.fx.symbolic_trace(layer)(x),
        torch.jit.trace(layer, x)(x),
        torch.export.export(layer, (x,)).module()(x),
    ):
        torch.testing.assert_close(found, want)


def test_a_compiled_layer_notices_a_hook():
    layer, x = make(), torch.randn(SHAPE).double()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    wrap(layer, "prune", CONTROL["ema"])
    torch.testing.assert_close(compiled(x), authors(layer)(x))


@pytest.mark.parametrize("how", ["lora", "prune", "replaced forward"])
@pytest.mark.parametrize(
    "use",
    [
        torch.jit.script,
        lambda model: torch.jit.script(model[1]),
        lambda model: model[1].weights(),
        ready_to_export,
        lambda model: attention_maps(model, torch.randn(SHAPE)),
    ],
    ids=["script", "script the layer", "weights", "export", "attend"],
)
def test_what_reads_the_weights_refuses_the_layer_with_the_remedy(how, use):
    model = nn.Sequential(nn.Conv2d(16, 16, 1).double(), wrapped(how))
    with pytest.raises(RuntimeError, match=r"because .*conv1x1.* First merge adapters \(peft: "):
        use(model)


def test_an_implementation_that_reads_weights_is_refused():
    layer = wrapped("lora")
    layer.impl = "closed_form"
    with pytest.raises(ValueError, match=r"but conv1x1 is a .*Lora\. Use impl='auto'"):
        layer(torch.randn(SHAPE).double())


def test_a_wrong_map_is_refused_as_by_a_plain_layer():
    with pytest.raises(ValueError, match=r"for 16 channels \(4 groups of 4\), got input with 8"):
        wrapped("lora")(torch.randn(1, 8, 3, 3).double())


def test_parameters_that_are_plain_tensors_are_read():
    """As in a replica of DataParallel, and under FSDP."""
    layer, x = make(), torch.randn(SHAPE).double()
    want = layer(x)
    for child in layer.children():
        for name, parameter in list(child.named_parameters()):
            delattr(child, name)
            setattr(child, name, parameter.detach().clone())
    torch.testing.assert_close(layer(x), want)
