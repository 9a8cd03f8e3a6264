"""The layer in the place of a pasted EMA class: its calls, its weights, its pickles."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from support.pasted_class import EMA
from torch import nn

from ema_timm import EmaAttn
from ema_timm.integrations.yolo import EmaAttnRow
from ema_timm.ops.reference import reference


def pasted(channels=64, factor=8):
    layer = EMA(channels, factor=factor)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# Calls.


@pytest.mark.parametrize(
    ("channels", "groups"), [(16, 16), (48, 24), (80, 20), (144, 24), (160, 32), (61, 1), (1, 1)]
)
def test_every_width_is_accepted(channels, groups):
    layer, x = EmaAttn(channels).double(), torch.randn(1, channels, 5, 4).double()
    assert layer.groups == groups
    torch.testing.assert_close(layer(x), reference(x, layer.weights(), groups))


def test_factor_is_another_name_of_groups():
    assert EmaAttn(64, factor=8).groups == EmaAttn(64, groups=8).groups == 8


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: EmaAttn(256, 256), TypeError, "positional"),
        (lambda: EmaAttn(64, groups=8, factor=16), TypeError, "groups=8 and factor=16. Give"),
        (lambda: EmaAttn(48, groups=32), ValueError, "48 channels .* 32 groups. Use groups=24, or"),
        (lambda: EmaAttn(48, factor=32), ValueError, "Use groups=24, or leave groups out"),
    ],
)
def test_a_pasted_call_that_means_something_else_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_sequence_as_a_map_of_one_row_is_the_definition():
    layer, x = EmaAttn(64, groups=8).double(), torch.randn(2, 64, 9).double()
    out = layer(x.unsqueeze(2)).squeeze(2)
    assert out.shape == x.shape
    want = reference(x.unsqueeze(2), layer.weights(), 8).squeeze(2)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((64, 7, 9), "x.unsqueeze(0)"),
        ((2, 64, 9), "x.unsqueeze(2)"),
        ((2, 6, 64), "x.transpose(1, 2).unflatten(2, (H, W))"),
        ((2, 64, 3, 7, 9), "x.transpose(1, 2).flatten(0, 1)"),
        ((2, 3, 64, 7, 9), "x.flatten(0, 1)"),
    ],
)
def test_other_dimensions_come_with_a_hint_that_works(shape, hint):
    layer, x = EmaAttn(64), torch.randn(shape)
    with pytest.raises(ValueError) as error:
        layer(x)
    said = str(error.value)
    assert f"got {len(shape)} with shape {shape}" in said and said.endswith(f": {hint}.")
    assert layer(eval(hint, {"x": x, "H": 2, "W": 3})).shape[1] == 64


def test_a_tensor_without_the_channels_comes_with_the_width():
    with pytest.raises(ValueError, match=r"got 3 with shape \(2, 5, 9\)\. Give a map with C = 64"):
        EmaAttn(64)(torch.randn(2, 5, 9))


# Weights.


def test_weights_of_a_pasted_class_load_and_compute_the_same():
    theirs, x = pasted().double(), torch.randn(2, 64, 6, 5).double()
    ours = EmaAttn(64, groups=8).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_with_another_number_of_groups_say_so(strict):
    weights = nn.Sequential(nn.Identity(), pasted(256, 8)).state_dict()
    model = nn.Sequential(nn.Identity(), EmaAttn(256))
    said = r"1: the file has 8 groups \(conv1x1 is 32×32\), the layer has 32 \(8×8\)\. Build .*=8\."
    with pytest.raises(RuntimeError, match=said):
        model.load_state_dict(weights, strict=strict)
    EmaAttn(256, groups=8).load_state_dict(pasted(256, 8).state_dict())


def test_weights_of_another_width_are_pytorchs_error():
    with pytest.raises(RuntimeError, match="size mismatch") as error:
        EmaAttn(64, groups=8).load_state_dict(pasted(80, 16).state_dict())
    assert "the file has" not in str(error.value)


# Pickles of whole models, whose class is then ours.


@pytest.fixture
def project(monkeypatch):
    """A module ``project`` with the pasted class; ``replace()`` imports the layer in its place."""
    module = types.ModuleType("project")
    monkeypatch.setitem(sys.modules, "project", module)
    own = type("EMA", (EMA,), {"__module__": "project", "__qualname__": "EMA"})
    module.EMA = own
    return module


def replaced(project, model, by=EmaAttn):
    """``model`` saved whole, and loaded where the class is ``by``."""
    saved = io.BytesIO()
    torch.save(model, saved)
    project.EMA = by
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("by", [EmaAttn, EmaAttnRow])
def test_a_pickle_of_a_whole_model_loads_as_the_layer(project, by):
    theirs = nn.Sequential(nn.Conv2d(3, 64, 1), project.EMA(64, factor=8)).double().eval()
    theirs[1].load_state_dict(pasted().state_dict())
    theirs[1].i, theirs[1].f = 7, -1  # what YOLO's builder leaves
    x = torch.randn(2, 3, 6, 5).double()
    ours = replaced(project, theirs, by)
    assert type(ours[1]) is by
    assert [name for name, _ in ours[1].named_children()] == ["conv1x1", "conv3x3", "gn"]
    assert (ours[1].channels, ours[1].groups, ours[1].i, ours[1].training) == (64, 8, 7, False)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    again = pickle.loads(pickle.dumps(ours))  # and is the layer from then on
    assert torch.equal(again(x), ours(x))
    assert repr(again[1]) == repr(ours[1])
    ours.train()(x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_a_pickle_of_a_class_with_other_spellings_of_the_same_loads(project):
    theirs = nn.Sequential(project.EMA(64, factor=8)).double().eval()
    theirs[0].load_state_dict(pasted().state_dict())
    x = torch.randn(2, 64, 6, 5).double()
    want = theirs(x)
    theirs[0].conv3x3.padding = "same"
    for name in ("num_groups", "group", "factor"):
        project.EMA, other = type(theirs[0]), copy.deepcopy(theirs)
        vars(other[0])[name] = vars(other[0]).pop("groups")
        ours = replaced(project, other)
        assert ours[0].groups == 8
        torch.testing.assert_close(ours(x), want, rtol=1e-10, atol=1e-10)


def no_bias(layer):
    layer.conv3x3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)


def wider(layer):
    layer.conv3x3 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)


def same_of_more(layer):
    layer.conv3x3 = nn.Conv2d(8, 8, 3, padding="same", dilation=2)


def other_eps(layer):
    layer.gn.eps = 1e-3


def more_weights(layer):
    layer.conv5x5 = nn.Conv2d(8, 8, 5, padding=2)


def no_convolution(layer):
    del layer.conv1x1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_bias, r"conv3x3 is Conv2d\(.*bias=False\), expected Conv2d\(8, 8"),
        (wider, r"dilation=\(2, 2\)\), expected"),
        (same_of_more, r"dilation=\(2, 2\).*, expected"),
        (other_eps, r"gn is GroupNorm\(.*eps=0.001.*expected .*eps=1e-05"),
        (more_weights, "conv5x5 has weights"),
        (no_convolution, "not of an EMA attention class: expected .* got softmax, agp"),
    ],
)
def test_a_class_that_computes_something_else_is_refused(project, change, said):
    theirs = project.EMA(64, factor=8)
    change(theirs)
    with pytest.raises(RuntimeError, match=rf"{said}.* Keep the class that it was made from"):
        replaced(project, theirs)


def test_a_weight_average_that_is_called_ema_is_refused(project):
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.decay = nn.Linear(2, 2), 0.99

    Average.__module__, Average.__qualname__ = "project", "EMA"
    project.EMA = Average
    with pytest.raises(RuntimeError, match=r"not of an EMA attention class: .* got module, decay"):
        replaced(project, Average())
