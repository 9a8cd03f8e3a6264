"""The gate maps are those of the layers, whoever computes them, and looking leaves no trace."""

import pytest
import timm
import torch
from support import oracle
from support.networks import shake
from torch import nn

from ema_timm import EmaAttn, set_implementation
from ema_timm.errors import UserError
from ema_timm.ops.reference import reference
from ema_timm.see.gates import attention_maps, last_of_stages, layer_gates

IMAGES = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def layer(groups=4, channels=16, **options):
    """One layer with random weights everywhere: fresh ones have γ = 1, β = 0."""
    made = EmaAttn(channels, groups=groups, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def watch(model, images):
    """Inputs and outputs of the EMA layers, copied when they passed."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, EmaAttn):

            def keep(module, inputs, output, name=name):
                seen[name] = inputs[0].clone(), output.clone()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def assert_exact(model, images, maps=None):
    """Maps times input equal the output, in every layer."""
    maps = attention_maps(model, images) if maps is None else maps
    seen = watch(model, images)
    assert list(maps) == list(seen)
    for name, (x, output) in seen.items():
        assert maps[name].shape[2:] == x.shape[2:]
        repeated = maps[name].repeat_interleave(x.shape[1] // maps[name].shape[1], dim=1)
        error = oracle.relative_error(x * repeated, output.double())
        assert error <= oracle.TOLERANCES[x.dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("impl", ["auto", "reference", "closed_form", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_maps_times_input_are_the_output(impl, dtype):
    model = nn.Sequential(layer()).to(dtype)
    x = torch.randn(2, 16, 7, 5).to(dtype)
    if impl == "fused":
        pytest.importorskip("triton")
        if dtype in (torch.float64, torch.float16):
            pytest.skip("the kernels take no float64, and Triton's interpreter takes its time")
    set_implementation(model, impl)
    assert_exact(model, x)


def test_maps_are_the_definition_in_float64():
    """Not only consistent with the layer: A of the paper's definition, by out / x where x is 1."""
    model = layer().double()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64).abs() + 0.5
    want = (reference(x, model.weights(), 4) / x)[:, ::4].detach()
    torch.testing.assert_close(attention_maps(model, x)[""], want)


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 1, 9), (2, 16, 8, 1)])
@pytest.mark.parametrize("cross_spatial", [True, False])
def test_flat_maps(shape, cross_spatial):
    assert_exact(nn.Sequential(layer(cross_spatial=cross_spatial)), torch.randn(shape))


def test_without_cross_spatial_learning_every_channel_has_its_own_map():
    model = nn.Sequential(layer(cross_spatial=False))
    x = torch.randn(2, 16, 7, 5)
    assert attention_maps(model, x)["0"].shape == (2, 16, 7, 5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_exact(model.to(dtype), x.to(dtype))


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_other_memory_layouts(layout):
    x = torch.randn(2, 16, 7, 10)
    x = x[..., ::2] if layout == "sliced" else x.to(memory_format=torch.channels_last)
    assert_exact(nn.Sequential(layer()), x)


def test_directional_gates_are_those_that_shape_the_map():
    """One group of one channel by hand: σ of the 1×1 convolution of the pooled rows, columns."""
    model, x = layer(groups=1, channels=1), torch.randn(1, 1, 4, 3)
    gates = layer_gates(nn.Sequential(model), x)["0"]
    weight, bias = model.conv1x1.weight.item(), model.conv1x1.bias.item()
    height, width = ((weight * x.mean(axis) + bias).sigmoid() for axis in (3, 2))
    torch.testing.assert_close(gates.along_height, height[:, None])
    torch.testing.assert_close(gates.along_width, width[:, None])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet_ema", {}),
        ("test_resnet_ema", {"features_only": True, "out_indices": (1, 2)}),
        ("test_resnet_ema", {"ema_cross_spatial": False}),
        ("mobilenetv2_035_ema", {"features_only": True}),
    ],
    ids=str,
)
def test_timm_networks(name, options):
    model = shake(timm.create_model(name, **options)).eval()
    assert_exact(model, IMAGES)


def test_detector_around_a_backbone():
    """Names are those in the whole network; the images are a list of any sizes."""
    detection = pytest.importorskip("torchvision.models.detection")

    class Backbone(nn.Module):
        out_channels = 96

        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_resnet_ema", features_only=True, out_indices=(4,))

        def forward(self, x):
            return self.body(x)[0]

    anchors = detection.anchor_utils.AnchorGenerator(((32,),), ((1.0,),))
    model = detection.FasterRCNN(
        shake(Backbone()), 2, min_size=64, max_size=64, rpn_anchor_generator=anchors
    ).eval()
    images = [torch.rand(3, 64, 48), torch.rand(3, 40, 64)]
    maps = attention_maps(model, images)
    assert list(maps) == [f"backbone.body.layer{i}.0.se" for i in (1, 2, 3, 4)]
    assert last_of_stages(model, layer_gates(model, images)) == list(maps)
    assert_exact(model, images, maps)


def test_under_autocast():
    model = shake(timm.create_model("test_resnet_ema")).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, seen = attention_maps(model, IMAGES), watch(model, IMAGES)
        assert_exact(model, IMAGES, maps)
    for name, (x, _) in seen.items():
        assert x.dtype == torch.bfloat16
        alone = attention_maps(model.get_submodule(name), x)[""]
        assert torch.equal(maps[name], alone)


def test_an_input_that_is_changed_in_place_afterwards():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = layer()

        def forward(self, x):
            x = x * 2
            gated = self.attention(x)
            x.zero_()
            return gated

    assert_exact(Block(), torch.randn(2, 16, 7, 5))


def test_images_are_moved_to_the_type_of_the_network():
    model = shake(timm.create_model("test_resnet_ema")).double().eval()
    maps = attention_maps(model, IMAGES)
    assert {each.dtype for each in maps.values()} == {torch.float64}
    assert_exact(model, IMAGES.double(), maps)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    """Neither hooks, nor eval mode, nor running statistics, nor gradients; nor after a failure."""
    model = timm.create_model("test_resnet_ema").train()
    model.layer2.eval()  # a frozen stage stays frozen
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = IMAGES.requires_grad_(False)
    if fails:
        model.layer4[0].conv2.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            attention_maps(model, images)
    else:
        maps = attention_maps(model, images)
        assert not any(each.requires_grad for each in maps.values())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


class TestRefusals:
    """One line that says why the layers cannot be watched, and what to give instead."""

    def refused(self, model, match):
        with pytest.raises(UserError, match=match) as caught:
            attention_maps(model, IMAGES)
        assert "\n" not in str(caught.value)
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_compiled(self):
        model = timm.create_model("test_resnet_ema")
        self.refused(torch.compile(model, backend="eager"), r"the network \(Opt.*is compiled")
        model.layer3.compile(backend="eager")
        self.refused(model, r"layer3 \(Sequential\) is compiled\. Give the network that")

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit announces its own end
    def test_scripted(self):
        model = torch.jit.script(timm.create_model("test_resnet_ema", scriptable=True))
        self.refused(model, "hides them as scripted")

    def test_spread_over_devices(self):
        model = nn.DataParallel(timm.create_model("test_resnet_ema"))
        self.refused(model, r"Give its \.module")

    def test_without_layers(self):
        self.refused(timm.create_model("test_resnet"), "ResNet has none")

    def test_a_layer_that_runs_twice(self):
        shared = EmaAttn(3, groups=3)
        self.refused(nn.Sequential(shared, shared), "0 ran twice")

    def test_layers_that_do_not_run(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1))
        model[0].unused = EmaAttn(3, groups=3)
        self.refused(model, "none of the 1 EMA attention layers of Sequential ran")


def test_last_of_stages():
    """By the numbers in the names; where there are none, by the maps' size."""
    model = timm.create_model("resnet18_ema", num_classes=2)
    assert last_of_stages(model, layer_gates(model, IMAGES)) == [
        f"layer{stage}.1.se" for stage in (1, 2, 3, 4)
    ]
    neck = nn.Sequential(
        layer(1, 3), layer(1, 3), nn.MaxPool2d(2), layer(1, 3), nn.Upsample(scale_factor=2),
        layer(1, 3),
    )  # fmt: skip
    assert last_of_stages(neck, layer_gates(neck, IMAGES)) == ["3", "5"]
