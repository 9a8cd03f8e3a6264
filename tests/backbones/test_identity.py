"""The identity initialisation is exact: a gate of one half to the last bit, whatever comes in."""

import pytest
import torch
from torch import nn

from ema_timm import EmaAttn
from ema_timm.backbones.warm_start import neutral_state
from ema_timm.export.layers import ready_to_export
from ema_timm.ops.cpu import chunks
from ema_timm.ops.formula import closed_form, fold, statistics_type

WIDTHS = [1, 2, 3, 6, 7, 12, 24, 61]  # channels of a group; most are no powers of two
AMPLITUDES = [1e-3, 1.0, 1e4, 1e12, 1e30]  # squares of the last are infinite


def neutral(n: int) -> EmaAttn:
    layer = EmaAttn(2 * n, groups=2)
    layer.load_state_dict(neutral_state(layer))
    return layer.eval()


def maps(n: int) -> torch.Tensor:
    return torch.randn(2, 2 * n, 9, 7, generator=torch.Generator().manual_seed(n)) + 0.5


def as_chunks(layer, x):
    folded = fold(statistics_type(x, layer.weights()))
    return chunks.forward(x, folded, layer.groups, save=False)[0]


FORMS = {
    "auto": lambda layer, x: layer(x),
    "channels last": lambda layer, x: layer(x.to(memory_format=torch.channels_last)),
    "float64": lambda layer, x: layer.double()(x.double()).float(),
    "chunks": as_chunks,
    "formula": lambda layer, x: closed_form(x, layer.weights(), layer.groups),
    "Inductor's formula": lambda layer, x: closed_form(x, layer.weights(), layer.groups, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", WIDTHS)
def test_gate_is_one_half_to_the_last_bit(n, form):
    with torch.no_grad():
        for amplitude in AMPLITUDES:
            x = maps(n) * amplitude
            assert torch.equal(FORMS[form](neutral(n), x), x * 0.5), amplitude


@pytest.mark.parametrize("n", [3, 24])
def test_a_recorded_forward_is_exact_and_the_layer_learns(n):
    layer, x = neutral(n), maps(n) * 1e4
    out = layer(x.requires_grad_())
    assert torch.equal(out, x * 0.5)
    (out * torch.randn_like(out)).sum().backward()
    for learned in (layer.gn.weight, layer.gn.bias, layer.conv3x3.weight):
        assert learned.grad.abs().max() > 0


def other_forms(layer: nn.Module, x: torch.Tensor) -> dict:
    forms = {"scripted": torch.jit.script(layer), "traced": torch.jit.trace(layer, x)}
    forms["exported"] = torch.export.export(layer, (x,)).module()
    for dialect in ("plain", "onnx", "pytorch", "delegate"):
        forms[f"ready to export, {dialect}"] = ready_to_export(layer, dialect, x)
    return forms


@pytest.mark.filterwarnings("ignore")  # torch.jit announces its own end, and export its own
@pytest.mark.parametrize("n", [3, 12, 61])
def test_scripted_traced_and_exported_layers_are_exact(n):
    with torch.no_grad():
        for name, form in other_forms(neutral(n), maps(n)).items():
            for amplitude in AMPLITUDES:
                x = maps(n) * amplitude
                assert torch.equal(form(x), x * 0.5), (name, amplitude)


def test_a_compiled_layer_is_exact():
    layer, x = neutral(6), maps(6) * 1e4
    with torch.no_grad():
        assert torch.equal(torch.compile(layer)(x), x * 0.5)


def test_infinite_and_undefined_input_still_shows_in_the_output():
    for bad in (float("inf"), float("nan")):
        x = maps(3)
        x[0, 0, 0, 0] = bad
        with torch.no_grad():
            for form in ("auto", "chunks"):
                assert FORMS[form](neutral(3), x).isnan().any(), (bad, form)
