"""The ablation without cross-spatial learning: its definition, and everything a layer must do."""

import copy
import io

import pytest
import timm
import torch
from support.networks import shake
from support.oracle import NAMES, make_case, output_and_gradients, relative_error, widened
from timm.utils import reparameterize_model
from torch import nn

import ema_timm
from ema_timm import EmaAttn, ema_attention
from ema_timm.backbones.warm_start import neutral_state

SHAPES = {
    "square": (2, 64, 32, 7, 7),
    "wide": (2, 48, 8, 3, 10),
    "one row": (2, 16, 4, 1, 6),
    "one column": (2, 16, 4, 6, 1),
    "one pixel": (3, 16, 4, 1, 1),
    "one channel a group": (2, 8, 8, 4, 5),
    "one group": (2, 12, 1, 4, 4),
}


def by_definition(x, weights, groups):
    """The authors' released layers in their order, with the two branches added: σ(x1 + x2)."""
    batch, channels, height, width = x.shape
    n = channels // groups
    folded = x.contiguous().view(batch * groups, n, height, width)
    pool_h, pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
    joined = torch.cat([pool_h(folded), pool_w(folded).transpose(2, 3)], dim=2)
    joined = nn.functional.conv2d(joined, weights.conv1x1_weight, weights.conv1x1_bias)
    along_h, along_w = torch.split(joined, [height, width], dim=2)
    gated = folded * torch.sigmoid(along_h) * torch.sigmoid(along_w).transpose(2, 3)
    first = [instance_norm(image, weights) for image in gated]
    second = nn.functional.conv2d(folded, weights.conv3x3_weight, weights.conv3x3_bias, padding=1)
    out = folded * torch.sigmoid(torch.stack(first) + second)
    return out.view(x.shape)


def instance_norm(image, weights):
    var, mean = torch.var_mean(image, dim=(1, 2), correction=0, keepdim=True)
    scale, shift = weights.gn_weight[:, None, None], weights.gn_bias[:, None, None]
    return (image - mean) / torch.sqrt(var + 1e-5) * scale + shift


def ablation(x, weights, groups):
    return ema_attention(x, weights, groups, cross_spatial=False)


def check(case, tolerance):
    truth = output_and_gradients(by_definition, widened(case))
    found = output_and_gradients(ablation, case)
    assert found["out"].dtype == case.x.dtype
    top = max(t.abs().max().item() for t in truth.values())
    for name in ("out", *NAMES):
        # As in oracle.py: a gradient that is zero by definition is noise on the others' scale.
        scale = max(truth[name].abs().max().item(), 0.01 * top)
        assert relative_error(found[name], truth[name], scale) <= tolerance, name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_every_gradient_equal_the_definition(name, layout):
    batch, channels, groups, *size = SHAPES[name]
    check(make_case((batch, channels, *size), groups, torch.float64, layout), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],  # see oracle.py
)
def test_precision_of_other_types(dtype, tolerance):
    check(make_case((2, 32, 9, 6), 4, dtype), tolerance)


def test_it_is_another_function_than_ema_attention():
    case = make_case((2, 32, 6, 6), 4)
    assert not torch.allclose(ablation(*case[:3]), ema_attention(*case[:3]), atol=1e-2)


def test_a_large_mean_costs_no_accuracy():
    case = make_case((2, 16, 8, 8), 4)
    case = case._replace(x=(case.x.detach() + 1000).requires_grad_())
    truth = by_definition(*widened(case)[:3])
    assert relative_error(ablation(*case[:3]), truth) < 1e-4


def layer(**kwargs):
    attn = EmaAttn(32, groups=8, cross_spatial=False, **kwargs)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attn


def test_parameters_are_those_of_the_full_layer():
    full, ablated = EmaAttn(32, groups=8), layer()
    ablated.load_state_dict(full.state_dict(), strict=True)
    assert [(k, v.shape) for k, v in full.state_dict().items()] == [
        (k, v.shape) for k, v in ablated.state_dict().items()
    ]
    ablated(torch.randn(2, 32, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ablated.parameters())


def test_repr_shows_the_ablation():
    assert "cross_spatial=False" in repr(layer())
    assert "cross_spatial" not in repr(EmaAttn(32, groups=8))


@pytest.mark.parametrize("value", ["false", 0, None, "cpu"])
def test_only_true_and_false_are_taken(value):
    with pytest.raises(TypeError, match="cross_spatial must be True or False"):
        EmaAttn(32, groups=8, cross_spatial=value)


@pytest.mark.parametrize("impl", ["reference", "closed_form"])
def test_another_implementation_is_refused(impl):
    attn = layer()
    attn.impl = impl
    with pytest.raises(ValueError, match=f"one implementation, got impl='{impl}'"):
        attn(torch.randn(1, 32, 4, 4))


def test_output_owns_its_memory_and_may_be_changed_in_place():
    attn, x = layer(), torch.randn(2, 32, 4, 5).contiguous(memory_format=torch.channels_last)
    out = attn(x.requires_grad_())
    assert not out._is_view()
    assert out.is_contiguous(memory_format=torch.channels_last)
    seen = []
    out.register_hook(seen.append)
    out += x
    out.sum().backward()
    assert len(seen) == 1


def test_statistics_in_float32_under_autocast():
    attn, x = layer(), torch.randn(2, 32, 6, 6) + 100
    with torch.autocast("cpu", torch.bfloat16):
        under = attn(x)
    assert under.dtype == torch.float32
    assert torch.equal(under, attn(x))


def compiled(attn):
    return torch.compile(attn, backend="aot_eager", fullgraph=True, dynamic=True)


def reloaded_script(attn):
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(attn), saved)
    saved.seek(0)
    return torch.jit.load(saved)


def exported(attn):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    return torch.export.export(attn, (torch.randn(2, 32, 8, 6),), dynamic_shapes=shapes).module()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit announces its own end
@pytest.mark.parametrize(
    "way",
    [
        reloaded_script,
        lambda attn: torch.jit.trace(attn, torch.randn(1, 32, 3, 5)),
        torch.fx.symbolic_trace,
        exported,
        compiled,
        copy.deepcopy,
    ],
    ids=["script", "trace", "fx", "export", "compile", "deepcopy"],
)
def test_other_forms_of_the_layer_compute_the_same_at_other_sizes(way):
    attn = layer()
    other = way(attn)
    for size in [(1, 32, 3, 5), (3, 32, 8, 6)]:
        x = torch.randn(size)
        torch.testing.assert_close(other(x), attn(x))


NAMES_OF_MODELS = ("resnet18_ema", "mobilenetv2_050_ema")


@pytest.mark.parametrize("name", NAMES_OF_MODELS)
def test_by_name_in_every_slot_and_in_a_saved_config(name, tmp_path):
    model = timm.create_model(name, ema_cross_spatial=False, num_classes=3)
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    assert layers
    assert not any(attn.cross_spatial for attn in layers)
    shake(model)
    folder = tmp_path / "saved"
    arguments = {"ema_cross_spatial": False}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model.eval()(x))


def test_a_word_where_a_bool_belongs_is_refused_by_name():
    with pytest.raises(TypeError, match="cross_spatial must be True or False, got 'false'"):
        timm.create_model("resnet18_ema", ema_cross_spatial="false")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_warm_start_computes_what_the_plain_network_computes(name, tmp_path):
    plain = shake(timm.create_model(name, num_classes=5)).eval()
    file = tmp_path / "plain.pt"
    torch.save(plain.state_dict(), file)
    warm = timm.create_model(
        f"{name}_ema",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 5},
        num_classes=5,
        ema_cross_spatial=False,
    ).eval()
    injected = ema_timm.inject(copy.deepcopy(plain), cross_spatial=False).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = plain(x)
        for model in (warm, injected, reparameterize_model(injected)):
            assert any(isinstance(m, EmaAttn) and not m.cross_spatial for m in model.modules())
            torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


def test_an_injected_network_remembers_the_ablation():
    model = ema_timm.inject(timm.create_model("resnet18"), cross_spatial=False)
    assert model.pretrained_cfg["architecture"] == "resnet18_ema"
    assert model._model_args == {"ema_cross_spatial": False}


def test_training_leaves_the_warm_start_at_once():
    attn = EmaAttn(32, groups=8, cross_spatial=False)
    attn.load_state_dict(neutral_state(attn))
    x = torch.randn(2, 32, 6, 6)
    assert torch.equal(attn(x), x * 0.5)
    attn(x).pow(3).sum().backward()
    grads = {name: p.grad for name, p in attn.named_parameters()}
    for name in ("conv3x3.weight", "conv3x3.bias", "gn.weight", "gn.bias"):
        assert (grads[name].flatten(1) if grads[name].dim() > 1 else grads[name]).abs().min() > 0
    outputs = grads["conv3x3.weight"].flatten(1)
    assert outputs.unique(dim=0).shape == outputs.shape  # no two output channels alike
