"""The passes that CUDA takes, run on the CPU: half precision, hard numbers, what they may call."""

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ema_timm.bench.authors_code import AuthorsEmaAttn
from ema_timm.ops.autograd import closed_form_eager
from ema_timm.ops.formula import fold
from ema_timm.ops.gpu import passes
from ema_timm.ops.weights import EmaWeights

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch):
    monkeypatch.setattr(passes, "takes", lambda x: True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 64, 28, 28), (2, 256, 14, 14), (2, 512, 7, 7)])
def test_half_precision_output_and_every_gradient_at_real_sizes(shape, layout, dtype):
    oracle.assert_matches(closed_form_eager, oracle.make_case(shape, 8, dtype, layout))


def authors_under_autocast(x, w, groups):
    """The published arrangement as CUDA's autocast runs it: the norm in float32."""
    layer = AuthorsEmaAttn(x.shape[1], groups=groups)
    gn = layer.gn
    gn.forward = lambda t: F.group_norm(
        t.float(), gn.num_groups, gn.weight.float(), gn.bias.float(), gn.eps
    )
    names = [name for name, _ in layer.named_parameters()]
    with torch.autocast("cpu", x.dtype):
        out = torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))
    return out.to(x.dtype)


HARD = {
    "far from zero": lambda z: 1000 + z,
    "ten away": lambda z: 10 + z,
    "constant channels": lambda z: z[..., :1, :1].expand_as(z) * 10,
    "rectified": lambda z: z.relu(),
    "dead channels": lambda z: z.relu() * (torch.arange(z.shape[1]) % 2)[:, None, None],
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", HARD)
def test_hard_numbers_in_half_precision_are_no_worse_than_the_authors_form(kind, dtype):
    """Nor are they out of range where those of the authors are within it."""
    total = {"ours": 0.0, "authors": 0.0}
    for seed in range(6):
        case = oracle.make_case((2, 64, 14, 14), 8, dtype, seed=seed)
        x = HARD[kind](case.x.detach().double()).to(dtype)
        case = case._replace(x=x.requires_grad_())
        truth = oracle.expected(case)
        ours = oracle.output_and_gradients(closed_form_eager, case)
        theirs = oracle.output_and_gradients(authors_under_autocast, case)
        assert ours["out"].isfinite().all()
        for name, value in theirs.items():
            assert ours[name].isfinite().all() or not value.isfinite().all(), name
        for key in ("out", "x"):
            if theirs[key].isfinite().all():
                total["ours"] += oracle.relative_error(ours[key], truth[key])
                total["authors"] += oracle.relative_error(theirs[key], truth[key])
    assert total["ours"] <= 1.1 * total["authors"]


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_that_cancel_are_no_worse_than_the_authors_form(dtype):
    """The bias of the 1×1 convolution: rows and columns of a tile nearly cancel in its gradient."""
    total = {"ours": 0.0, "authors": 0.0}
    for seed in range(6):
        case = oracle.make_case((2, 64, 14, 14), 8, dtype, seed=seed)
        truth = oracle.expected(case)["conv1x1_bias"]
        for name, form in (("ours", closed_form_eager), ("authors", authors_under_autocast)):
            found = oracle.output_and_gradients(form, case)["conv1x1_bias"]
            total[name] += oracle.relative_error(found, truth)
    assert total["ours"] <= 0.5 * total["authors"]


class Calls(TorchDispatchMode):
    """Notes every operator with its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.seen.append((func._schema.name.removeprefix("aten::"), args, tensors))
        return result


def calls(dtype, layout):
    case = oracle.make_case((2, 64, 9, 7), 8, dtype, layout)
    weights = EmaWeights(*[w.detach().float().requires_grad_() for w in case.weights])
    with Calls() as seen:
        out = closed_form_eager(case.x, weights, 8)
        torch.autograd.grad(out, [case.x, *weights], case.grad)
    return case.x, seen.seen


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_may_round_to_tf32_sees_float32(dtype, layout):
    for name, args, tensors in calls(dtype, layout)[1]:
        if tensors and tensors[0].dtype == torch.float32:
            assert name not in ("mm", "addmm", "bmm", "baddbmm", "convolution"), name
            if name == "_convolution":
                assert args[-1] is False
            if name == "convolution_backward":  # of single channels: no library rounds it
                assert args[-2] == tensors[1].shape[1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_map_is_never_copied_nor_widened(dtype, layout):
    x, seen = calls(dtype, layout)
    for name, _, tensors in seen:
        large = [t for t in tensors if t.numel() == x.numel()]
        assert name not in ("_to_copy", "clone", "copy_") or not large, name
        assert all(t.dtype == dtype for t in large), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_output_and_gradient_are_laid_out_like_the_input(dtype, layout, device):
    """On CUDA as its operators say of fake tensors. A leaf's gradient is laid out by autograd."""
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(2, 64, 9, 7, dtype=dtype, device=device).to(memory_format=format)
        weights = [torch.empty_like(w, device=device) for w in oracle.make_weights(8)]
        weights = EmaWeights(*[w.detach().float() for w in weights])
        out, saved = passes.forward(x, fold(weights), 8, save=True)
        dx, _ = passes.backward(torch.empty_like(x), x, saved, weights, 8)
    assert out.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_may_lie_in_memory_in_any_order(dtype):
    case = oracle.make_case((2, 64, 9, 7), 8, dtype)

    def turned(w):
        """The same numbers, of a kernel column after column."""
        w = w.detach()
        return w.mT.contiguous().mT if w.dim() == 4 else w

    weights = EmaWeights(*[turned(w).requires_grad_() for w in case.weights])
    oracle.assert_matches(closed_form_eager, case._replace(weights=weights))
