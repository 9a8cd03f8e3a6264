"""The folded form of a layer: the same function from fewer numbers, one way only."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from ema_timm.attention import EmaAttn


def layer(channels=24, groups=4, **kwargs):
    torch.manual_seed(0)
    attn = EmaAttn(channels, groups, **kwargs)
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return attn


def folded(attn):
    attn = copy.deepcopy(attn)
    attn.reparameterize()
    return attn


@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_stays_the_same_from_fewer_parameters(groups, layout):
    attn = layer(24, groups).double()
    x = torch.randn(2, 24, 7, 5, dtype=torch.double).contiguous(memory_format=layout)
    small = folded(attn)
    torch.testing.assert_close(small(x), attn(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(small.float()(x.float()), attn(x).float(), rtol=1e-4, atol=1e-5)
    numbers = [sum(p.numel() for p in m.parameters()) for m in (small, attn)]
    assert numbers[0] < numbers[1]
    assert not any(p.requires_grad for p in small.parameters())


def test_half_precision_weights_and_autocast():
    attn, x = layer().bfloat16(), torch.randn(2, 24, 6, 6, dtype=torch.bfloat16)
    small = folded(attn)
    torch.testing.assert_close(small(x), attn(x), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert folded(layer())(x.float()).dtype == torch.float32


def test_state_dict_is_the_documented_one_and_an_old_checkpoint_is_refused():
    attn = layer()
    checkpoint = copy.deepcopy(attn.state_dict())
    small = folded(attn)
    assert {k: tuple(v.shape) for k, v in small.state_dict().items()} == {
        "folded.mix_weight": (6, 6),
        "folded.mix_bias": (6,),
        "folded.kernel": (9, 6),
        "folded.vote_weight": (5, 54),
        "folded.vote_bias": (5,),
        "folded.gn_weight": (6,),
        "folded.gn_bias": (6,),
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        small.load_state_dict(checkpoint)


def test_a_second_call_does_nothing():
    small = folded(layer())
    before = small.folded
    small.reparameterize()
    assert small.folded is before


def test_timm_reparameterizes_a_whole_model():
    model = timm.create_model("resnet18", block_args={"attn_layer": EmaAttn}).eval()
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # timm zeroes the last one: EMA would see zeros
            torch.nn.init.normal_(m.weight, mean=1.0, std=0.1)
    small = reparameterize_model(model)
    assert sum(isinstance(m, EmaAttn) and m.folded is not None for m in small.modules()) == 8
    assert all(m.folded is None for m in model.modules() if isinstance(m, EmaAttn))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-3)


def test_gradient_of_the_input_still_flows():
    attn, x = layer().double(), torch.randn(1, 24, 5, 6, dtype=torch.double, requires_grad=True)
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (attn, folded(attn))]
    torch.testing.assert_close(*grads)


def test_folded_layer_copies_pickles_and_traces():
    small, x = folded(layer()), torch.randn(2, 24, 6, 9)
    other = torch.randn(1, 24, 4, 5)
    ways = [copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways += [torch.jit.script(small), torch.jit.trace(small, x), torch.fx.symbolic_trace(small)]
    for way in ways:
        torch.testing.assert_close(way(other), small(other), rtol=1e-4, atol=1e-5)
