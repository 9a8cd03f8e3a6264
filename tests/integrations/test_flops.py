"""Counters of operations report what the EMA layers compute: plain twin plus their part."""

from unittest.mock import patch

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ema_timm import EmaAttn, children
from ema_timm.backbones.complexity import count_macs
from ema_timm.integrations import flops
from ema_timm.integrations.yolo import EmaAttnRow
from ema_timm.ops.operators import closed_form_operator

SIZE = (3, 64, 64)
# The counters warn about what they do not know.
pytestmark = pytest.mark.filterwarnings("ignore")


def by_thop(model):
    thop = pytest.importorskip("thop")
    return thop.profile(model, (torch.zeros(1, *SIZE),), flops.thop_ops(model), verbose=False)[0]


def by_ptflops(model, backend):
    return pytest.importorskip("ptflops").get_model_complexity_info(
        model, SIZE, as_strings=False, print_per_layer_stat=False, backend=backend,
        custom_modules_hooks=flops.ptflops_hooks(model),
    )[0]  # fmt: skip


def by_calflops(model):
    calflops = pytest.importorskip("calflops")
    known = calflops.pytorch_ops.MODULE_HOOK_MAPPING
    before = dict(known)
    known.update(flops.calflops_hooks(model))
    try:
        found = calflops.calculate_flops(
            model, (1, *SIZE), output_as_string=False, print_results=False
        )
    finally:
        known.clear()
        known.update(before)
    assert found[0] > 2 * found[1]  # operations are more than twice the multiplications
    return found[1]


def by_fvcore(model):
    nn = pytest.importorskip("fvcore.nn")
    analysis = nn.FlopCountAnalysis(model, torch.zeros(1, *SIZE))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.set_op_handle(**flops.fvcore_handles()).total()


def by_pytorch(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SIZE))
    return counter.get_total_flops() // 2


COUNTERS = {
    "thop": by_thop,
    "ptflops": lambda model: by_ptflops(model, "pytorch"),
    "ptflops-aten": lambda model: by_ptflops(model, "aten"),
    "calflops": by_calflops,
    "fvcore": by_fvcore,
    "pytorch": by_pytorch,
}


@pytest.mark.parametrize("counter", COUNTERS)
def test_a_counter_tells_plain_and_ema_networks_apart(counter):
    ema, plain = (
        timm.create_model("test_resnet_ema").eval(),
        timm.create_model("test_resnet").eval(),
    )
    part = count_macs(ema, SIZE)["ema"]
    assert part > 0
    more = COUNTERS[counter](ema) - COUNTERS[counter](plain)
    assert more == part


class Doubling(EmaAttn):
    """A subclass as users write one."""

    def forward(self, x):
        return 2 * self.gated(x)


@pytest.mark.parametrize("kind", [Doubling, EmaAttnRow])
@pytest.mark.parametrize("counter", [name for name in COUNTERS if name != "pytorch"])
def test_a_counter_finds_subclasses_and_rows_of_yolo(counter, kind):
    conv = nn.Conv2d(3, 16, 3)
    layer = kind(16, groups=4)
    more = COUNTERS[counter](nn.Sequential(conv, layer)) - COUNTERS[counter](nn.Sequential(conv))
    # ptflops sees the product of `Doubling` too.
    assert more - layer.macs(1, 62, 62) in (0, 16 * 62 * 62)


@pytest.mark.parametrize("hooks", [flops.thop_ops, flops.ptflops_hooks, flops.calflops_hooks])
def test_without_a_network_hooks_are_for_every_subclass(hooks):
    assert {EmaAttn, EmaAttnRow, Doubling} <= hooks().keys()
    assert EmaAttnRow not in hooks(nn.Sequential(Doubling(16)))


@pytest.mark.parametrize("counter", ["thop", "torchinfo", "calflops"])
def test_a_counter_that_hooks_the_children_does_not_make_the_layer_call_them(counter):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), EmaAttn(16, groups=4)).eval()
    module = pytest.importorskip(counter)
    called = []
    with patch.object(children, "definition", lambda *a: called.append(a)):
        if counter == "thop":
            plain = module.profile(model[:1], (torch.zeros(1, *SIZE),), verbose=False)[0]
            assert module.profile(model, (torch.zeros(1, *SIZE),), verbose=False)[0] == plain
        elif counter == "torchinfo":
            module.summary(model, (1, *SIZE), verbose=0)
        else:
            module.calculate_flops(model, (1, *SIZE), print_results=False)
    assert not called


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("how", ["eager", "operator"])
def test_pytorch_counts_a_step_of_training_three_times(how):
    """As of a convolution; the operator, which compiled networks run, has formulas of its own."""
    layer, x = EmaAttn(64, groups=8), torch.randn(3, 64, 14, 10, requires_grad=True)
    macs = layer.macs(3, 14, 10)

    def forward(x):
        return layer(x) if how == "eager" else closed_form_operator(x, layer.weights(), 8)

    assert counted(lambda: forward(x)) == macs
    assert counted(lambda: forward(x).sum().backward()) == 3 * macs
    layer.requires_grad_(False)
    if how == "operator":  # by autograd it is some more: the gates' own gradients need both
        assert counted(lambda: forward(x).sum().backward()) == 2 * macs
