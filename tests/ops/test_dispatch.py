"""Which implementation runs where, and how much Python one call of the layer costs."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ema_timm
from ema_timm.attention import EmaAttn
from ema_timm.ops import dispatch
from ema_timm.ops.cpu import library

SHAPE = (2, 8, 6, 5)


def implementation(x, impl="auto"):
    return dispatch._implementation(x, EmaAttn(8, groups=2, device=x.device).weights(), 2, impl)


def test_eager_calls_take_the_hand_written_passes():
    assert implementation(torch.randn(SHAPE)) is dispatch.closed_form_eager
    assert implementation(torch.randn(SHAPE), "closed_form") is dispatch.closed_form_eager
    with FakeTensorMode():
        x = torch.randn(SHAPE, device="cuda")
        assert implementation(x, "closed_form") is dispatch.closed_form_eager


def test_named_implementations_are_taken_as_they_are(monkeypatch):
    assert implementation(torch.randn(SHAPE), "reference") is dispatch.reference
    monkeypatch.setattr(dispatch, "require_fused", lambda *_: None)
    assert implementation(torch.randn(SHAPE), "fused") is dispatch._fused


@pytest.mark.parametrize(
    ("device", "exporting", "name"),
    [
        ("cpu", False, "_closed_form_operator"),
        ("cuda", False, "_closed_form_for_inductor"),
        ("mps", False, "closed_form"),
        ("cpu", True, "closed_form_exported"),
        ("cuda", True, "closed_form_exported"),
    ],
)
def test_compilers_and_exporters_take_what_suits_the_device(monkeypatch, device, exporting, name):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(dispatch, "_is_exporting", lambda: exporting)
    x = SimpleNamespace(device=torch.device(device))
    assert dispatch._closed_form(x) is getattr(dispatch, name)


def test_tracers_take_what_exporters_take(monkeypatch):
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert dispatch._closed_form(torch.randn(SHAPE)) is dispatch.closed_form_exported


@pytest.mark.parametrize("contiguous", [True, False])
def test_devices_without_passes_of_their_own_take_chunks_of_contiguous_maps(contiguous):
    x = SimpleNamespace(device=torch.device("mps"), is_contiguous=lambda: contiguous)
    expected = dispatch.closed_form_eager if contiguous else dispatch.closed_form
    assert dispatch._closed_form(x) is expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # PyTorch's own, at first use
def test_what_must_see_pytorchs_operators_takes_the_formula():
    assert implementation(torch.randn(SHAPE, device="meta")) is dispatch.closed_form
    with FakeTensorMode():
        assert implementation(torch.randn(SHAPE)) is dispatch.closed_form
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch._closed_form(x)) or x)(torch.randn(1, *SHAPE))
    with forward_ad.dual_level():
        x = torch.randn(SHAPE)
        seen.append(dispatch._closed_form(forward_ad.make_dual(x, x)))
    assert seen == [dispatch.closed_form] * 2


PACKAGE = str(Path(ema_timm.__file__).parent)


def python_calls(function):
    """Calls of Python functions that this package makes, or that run its code.

    Comprehensions do not count, because Python 3.12 no longer makes a call of them, and neither do
    calls inside PyTorch, which depend on its version.
    """
    names = []

    def note(frame, event, _):
        files = [f.f_code.co_filename for f in (frame, frame.f_back)]
        if event == "call" and any(file.startswith(PACKAGE) for file in files):
            names.append(frame.f_code.co_name)

    function()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return [name for name in names if name not in ("<listcomp>", "<genexpr>")]


@pytest.mark.skipif(library.library() is None, reason=f"no native kernel: {library.status()}")
@pytest.mark.parametrize(("recorded", "most"), [(False, 38), (True, 44)])
def test_a_forward_on_the_cpu_makes_few_calls_of_python(recorded, most):
    """The limits are what the code needs. Small maps spend much of their time in these calls."""
    layer, x = EmaAttn(64, groups=8), torch.randn(2, 64, 14, 14)
    with nullcontext() if recorded else torch.no_grad():
        names = python_calls(lambda: layer(x))
    assert len(names) <= most, "\n".join(names)
