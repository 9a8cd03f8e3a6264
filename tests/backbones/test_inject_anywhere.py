"""`inject(model, at=...)`: EMA attention in networks of any kind."""

import copy
import io
import json
import logging
import subprocess
import sys

import pytest
import timm
import torch
from support.networks import shake
from torch import nn

from ema_timm import EmaAttn, hooks, inject, placement

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Unet(nn.Module):
    """A decoder of one's own, with a skip connection and two blocks in one container."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.ModuleDict({"a": Block(24), "b": Block(24)})
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)

    def forward(self, x):
        x = self.down(x)
        for block in self.middle.values():
            x = block(x) + x
        return self.up(x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x))


class Stage(nn.Module):
    """Runs all of its children itself, as timm's RegStage does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Block(3), Block(3)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(3)

    def forward(self, x):
        return self.block(self.block(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.pool = Both(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.unused = Block(3)

    def forward(self, x):
        x, _ = self.both(x)
        return self.pool(x)


class Both(Block):
    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        return super().forward(x), x


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, EmaAttn)}


def trained(model):
    """Move every parameter, so that the layers do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def run(model, x=IMAGES):
    with torch.no_grad():
        return model(x)


def make_unet(**options):
    torch.manual_seed(0)
    return inject(shake(Unet()).eval(), at="middle.*", example=IMAGES, **options)


def test_outputs_stay_the_same_to_the_last_bit_and_names_stay():
    plain = shake(Unet()).eval()
    model = inject(copy.deepcopy(plain), at=["middle.*", "up"], example=IMAGES, groups=8)
    assert list(layers(model)) == ["middle.a.ema", "middle.b.ema", "up.ema"]
    assert [layer.groups for layer in layers(model).values()] == [8, 8, 6]
    kept = [name for name in model.state_dict() if ".ema." not in name]
    assert kept == list(plain.state_dict())
    for amplitude in (1.0, 1e4, 1e8):
        assert torch.equal(run(model, IMAGES * amplitude), run(plain, IMAGES * amplitude))
    assert not torch.equal(run(trained(model)), run(trained(plain)))


def test_every_layer_runs_once_and_learns():
    model, ran = make_unet().train(), []
    for name, layer in layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(IMAGES).square().mean().backward()
    assert sorted(ran) == sorted(layers(model))
    for layer in layers(model).values():
        for learned in (layer.gn.weight, layer.gn.bias, layer.conv3x3.weight):
            assert learned.grad.abs().max() > 0


@pytest.mark.parametrize("preserve", [True, False])
def test_placement_rebuilds_the_network_without_an_example(preserve):
    model = trained(make_unet(preserve=preserve, groups=8))
    described = json.loads(json.dumps(placement(model)))
    gain = 2 if preserve else 1
    place = {"channels": 24, "groups": 8, "gain": gain, "layout": "NCHW"}
    assert described == {"at": {"middle.a": place, "middle.b": place}}
    fresh = inject(Unet(), **described).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(fresh), run(model))


def test_placement_lists_the_layers_of_a_name_and_of_replaced_modules():
    for name in ("resnet18_ema", "mobilenetv2_050_ema"):
        model = trained(shake(timm.create_model(name)))
        fresh = inject(timm.create_model(name.removesuffix("_ema")), **placement(model)).eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(run(fresh), run(model))


def test_a_pattern_star_is_one_name_between_dots():
    model = timm.create_model("resnet18", device="meta")
    inject(model, at="layer[12].*")
    assert list(layers(model)) == [f"layer{i}.{j}.ema" for i in (1, 2) for j in (0, 1)]


def test_a_container_is_replaced_by_its_last_block():
    model = timm.create_model("resnet18", device="meta")
    assert list(layers(inject(model, at="layer?"))) == [f"layer{i}.1.ema" for i in (1, 2, 3, 4)]
    own = inject(nn.Sequential(Stage()), at="0", example=torch.randn(1, 3, 8, 8))
    assert list(layers(own)) == ["0.last.ema"]


@pytest.mark.parametrize(
    ("model", "at", "said"),
    [
        (Unet, "middle", r"middle \(ModuleDict\) .* only a list.*'middle\.\*'"),
        (
            Unet,
            "middle.c",
            r"'middle.c' matches no module of Unet, which has down.0, down.1, middle.a, middle.b\.",
        ),
        (Unet, ["up", "nothing.*"], r"'nothing\.\*' matches no module"),
        (Twice, "block", r"block \(Block\) .* called 2 times"),
        (Pair, "both", r"both \(Both\) .* returns a tuple, not one map"),
        (Pair, "pool", r"pool\.1 \(Flatten\) .* returns shape \(2, 3\)"),
        (Pair, "unused", r"unused \(Block\) .* not called"),
        (make_unet, "middle.a", r"middle\.a has EMA attention already"),
        (make_unet, "middle.a.ema", r"middle\.a\.ema has EMA attention already"),
    ],
)
def test_what_cannot_take_a_layer_is_refused_by_name_and_nothing_changes(model, at, said):
    model = model()
    before = [(name, type(m), dict(m._forward_hooks)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=said):
        inject(model, at=at, example=IMAGES)
    assert before == [(name, type(m), dict(m._forward_hooks)) for name, m in model.named_modules()]


def test_a_shared_module_is_refused():
    model = Unet()
    model.middle["b"] = model.middle["a"]
    for at, said in [
        ("middle.a", "a is shared: it is also middle.b"),
        ("middle.b", "b is shared: it is also middle.a"),
        ("middle.*", "a is shared"),
        ("middle.b.conv", "also middle.a.conv"),
    ]:
        with pytest.raises(ValueError, match=said):
            inject(model, at=at, example=IMAGES)
    model = Unet()
    model.alias = model.up
    with pytest.raises(ValueError, match=r"up is shared: it is also alias"):
        inject(model, at="up", example=IMAGES)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"at": 3}, TypeError, "at must be 'paper', 'stages', 'se'"),
        ({"at": []}, TypeError, "at must be"),
        ({"at": {}}, ValueError, "places nothing"),
        ({"at": "up"}, ValueError, "does not say what its input is.*example="),
        ({"at": "up", "example": torch.randn(1, 5, 8, 8)}, ValueError, "could not be run once"),
        ({"at": "up", "stages": (1,), "example": IMAGES}, ValueError, "stages are for at='paper'"),
        ({"at": {"up": {"channels": 12, "groups": 5}}}, ValueError, "groups that divide channels"),
        ({"at": {"up": {"width": 12}}}, ValueError, "must give channels and groups"),
        ({"at": {"off": {"channels": 12, "groups": 4}}}, ValueError, "has no module off"),
        ({"at": {"up": {"channels": 12, "groups": 4}}, "groups": 8}, ValueError, "no other arg"),
        ({"replace": True}, ValueError, "Say where the layers go: at='stages'"),
        ({"example": IMAGES}, ValueError, r"names of modules, at='layer1\.\*'"),
        ({}, TypeError, r'inject\(model, at="PATTERN", example=images\)'),
    ],
)
def test_wrong_arguments_say_what_to_write(options, error, said):
    model = Unet()
    with pytest.raises(error, match=said):
        inject(model, **options)
    assert not layers(model)


def test_the_places_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        make_unet()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "ema_timm.backbones.inject"]
    assert "EMA attention at 2 places of Unet, 28 parameters; its outputs stay the same" in line
    assert "middle.b        24      24          14" in line


def test_a_layer_that_a_later_step_drops_is_warned_of(caplog):
    inject(Unet(), at=["middle.*.conv", "middle.*.norm"], example=IMAGES)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    convs, norms = said
    assert "int8 conversion" in convs and "middle.a.conv (Conv2d), middle.b.conv (Conv2d)" in convs
    assert "SyncBatchNorm" in norms and "middle.a.norm (BatchNorm2d)" in norms
    caplog.clear()
    inject(timm.create_model("repvit_m0_9", device="meta"), at="stages.0.blocks.*.token_mixer")
    assert "reparameterize_model" in caplog.text


def test_maps_with_channels_last_in_memory_order_are_taken():
    plain = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2).eval()
    model = inject(copy.deepcopy(plain), at="stages")
    assert {place["layout"] for place in placement(model)["at"].values()} == {"NHWC"}
    assert torch.equal(run(model), run(plain))
    fresh = inject(copy.deepcopy(plain), **placement(model))
    fresh.load_state_dict(trained(model).state_dict(), strict=True)
    assert torch.equal(run(fresh.eval()), run(model))


def test_half_precision_starts_exactly_too():
    for dtype in (torch.bfloat16, torch.float16):
        plain = shake(Unet()).eval()
        model = inject(copy.deepcopy(plain), at="middle.*", example=IMAGES, groups=2)
        x = IMAGES.to(dtype)
        assert torch.equal(run(model.to(dtype), x), run(plain.to(dtype), x))
        with torch.autocast("cpu", torch.bfloat16):
            model, plain = model.float(), plain.float()
            assert torch.equal(run(model), run(plain))


def scripted(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, IMAGES)


def exported(model):
    return torch.export.export(model, (IMAGES,)).module()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TRANSFORMS = [copy.deepcopy, saved, torch.fx.symbolic_trace, compiled, scripted, traced, exported]


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it scripts and exports
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_copies_of_every_kind_keep_the_layers(transform):
    model = trained(inject(shake(Stem()).eval(), at="blocks.*", example=IMAGES, groups=4))
    want = run(model)
    torch.testing.assert_close(run(transform(model)), want, rtol=1e-4, atol=1e-4)
    for layer in layers(model).values():  # the comparison sees the layers
        layer.gn.bias.data += 1
    assert (run(model) - want).abs().max() > 1e-2


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))

    def forward(self, x):
        return self.blocks(self.conv(x))


FRESH = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
seen = []
for name, module in model.named_modules():
    if ".ema." not in name:  # with hooks inside it, a layer calls its children
        module.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
saved = torch.load(sys.argv[2])
with torch.no_grad():
    # Hooked children make a layer call them, which rounds otherwise.
    torch.testing.assert_close(model(saved["x"]), saved["y"], rtol=1e-4, atol=1e-4)
assert seen.count("EmaAttn") == 4
"""


def test_a_pickle_keeps_its_layers_in_a_fresh_process_that_adds_hooks(tmp_path):
    """PyTorch numbers hooks from 0 in each process, and a number taken twice is a hook lost."""
    model = trained(shake(inject(timm.create_model("resnet18"), at="stages")))
    torch.save(model, tmp_path / "model.pt")
    x = IMAGES[:1]
    torch.save({"x": x, "y": run(model, x)}, tmp_path / "saved.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "model.pt", tmp_path / "saved.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_layer_that_the_network_cannot_run_in_place_of_a_module_is_refused():
    class Asks(Unet):
        def forward(self, x):
            return super().forward(x) * self.middle["a"].scale

    model = Asks()
    model.middle["a"].scale, before = 2, model.middle["a"]
    with pytest.raises(ValueError, match=r"fails with layers instead of middle\.a.*scale"):
        inject(model, at="middle.a", example=IMAGES, replace=True)
    assert model.middle["a"] is before


COMPILED = """
import sys, timm, torch
model, saved = torch.load(sys.argv[1], weights_only=False), torch.load(sys.argv[2])
plain = timm.create_model("resnet18").eval()
plain.load_state_dict(model.state_dict(), strict=False)
with torch.no_grad():
    torch.compile(plain, backend="eager")(saved["x"])
    torch.testing.assert_close(torch.compile(model, backend="eager")(saved["x"]), saved["y"])
"""


def test_compiled_code_of_another_network_is_not_run_for_one_with_layers():
    """By default torch.compile does not look for hooks, and skips the layers."""
    torch._dynamo.reset()
    plain = shake(Unet()).eval()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        run(torch.compile(plain, backend="eager"))
        model = trained(inject(copy.deepcopy(plain), at="middle.*", example=IMAGES))
        other = inject(copy.deepcopy(plain), at="up", example=IMAGES, preserve=False)
        for each in (model, other, plain, inject(plain, at="up", example=IMAGES, preserve=False)):
            torch.testing.assert_close(run(torch.compile(each, backend="eager")), run(each))


def test_compiled_code_of_another_network_is_not_run_for_a_pickle(tmp_path):
    model = trained(shake(inject(timm.create_model("resnet18"), at="stages")))
    torch.save(model, tmp_path / "model.pt")
    torch.save({"x": IMAGES, "y": run(model)}, tmp_path / "saved.pt")
    command = [sys.executable, "-c", COMPILED, tmp_path / "model.pt", tmp_path / "saved.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_hooks_of_a_pickle_are_public_names():
    assert hooks.__name__ == "ema_timm.hooks"
    assert {hook.__qualname__ for hook in hooks.HOOKS.values()} == {
        "gate_output",
        "gate_output_doubled",
        "gate_output_nhwc",
        "gate_output_nhwc_doubled",
    }


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_is_wrapped_or_scripted_is_refused(tmp_path):
    """DistributedDataParallel would never average the gradients of layers that are added later."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Unet())
        sharded = fully_shard(Unet(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()
    for model, at in ((wrapped, "module.middle.*"), (sharded, "middle.*")):
        with pytest.raises(ValueError, match=r"wrapped already \(.*Inject into the network first"):
            inject(model, at=at, example=IMAGES)
        assert not layers(model)
    with pytest.raises(TypeError, match="script it afterwards"):
        inject(torch.jit.script(Block(3)), at="conv", example=IMAGES)
    part = Unet()
    part.up = torch.jit.script(part.up)
    with pytest.raises(ValueError, match=r"up \(.*is TorchScript"):
        inject(part, at="up", example=IMAGES)


@pytest.mark.filterwarnings("ignore")
def test_distributed_training_and_checkpointing_and_averaging(tmp_path):
    from timm.utils import ModelEmaV3
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    model = make_unet().train()
    average = ModelEmaV3(model, decay=0.5)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(IMAGES).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, IMAGES, use_reentrant=False).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-5)
    trained(model)
    average.update(model)
    assert layers(average.module).keys() == layers(model).keys()
    assert not torch.equal(run(average.module.eval()), run(make_unet()))


def test_se_layers_are_followed_or_replaced(caplog):
    plain = shake(timm.create_model("mobilenetv3_small_050")).eval()
    model = inject(copy.deepcopy(plain), at="se")
    assert len(layers(model)) == 9
    assert torch.equal(run(model), run(plain))
    caplog.clear()
    replaced = inject(copy.deepcopy(plain), at="se", replace=True)
    assert "the outputs change" in caplog.text
    assert len(layers(replaced)) == 9
    assert not [n for n, m in replaced.named_modules() if type(m).__name__ == "SqueezeExcite"]
    assert not torch.allclose(run(replaced), run(plain), rtol=1e-3)
    fresh = inject(timm.create_model("mobilenetv3_small_050"), **placement(replaced)).eval()
    fresh.load_state_dict(replaced.state_dict(), strict=True)
    assert torch.equal(run(fresh), run(replaced))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("skresnet18", r"SelectiveKernelAttn"),
        ("resnet18", "has no SE layer or other gate of a map. Use at='stages'"),
    ],
)
def test_networks_without_a_gate_of_a_map_say_what_they_have(name, said):
    with pytest.raises(ValueError, match=said):
        inject(timm.create_model(name, device="meta"), at="se", replace=True)


def test_other_families_are_filled_whole_or_refused_with_the_line_that_works():
    hrnet = timm.create_model("hrnet_w18_small", device="meta")
    with pytest.raises(TypeError, match=r'elsewhere .*inject\(model, at="stages"\)'):
        inject(hrnet)
    assert not layers(hrnet)
    assert len(layers(inject(hrnet, at="stages"))) == 4
    with pytest.raises(ValueError, match=r'at="se", replace=True'):
        inject(timm.create_model("efficientnet_b0", device="meta"))


@pytest.mark.filterwarnings("ignore")  # torchvision's own
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny", "mobilenet_v3_small"])
def test_torchvision_networks(name):
    torchvision = pytest.importorskip("torchvision")
    at = {
        "resnet18": "layer?.*",
        "densenet121": "features.transition?",
        "convnext_tiny": "features.?",
    }
    plain = shake(torchvision.models.get_model(name)).eval()
    model = inject(copy.deepcopy(plain), at=at.get(name, "se"), example=IMAGES)
    assert len(layers(model)) > 2
    assert torch.equal(run(model), run(plain))


def test_the_log_of_a_rebuilt_network_says_whether_its_outputs_change(caplog):
    for preserve, said in ((True, "stay the same"), (False, "its outputs change")):
        described = placement(make_unet(preserve=preserve))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            inject(Unet(), **described)
        assert said in caplog.text
