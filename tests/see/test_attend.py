"""Where the network looks is where the object is, and the picture says so in its own numbers."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from support.image_modes import in_mode
from timm.models.resnet import BasicBlock

from ema_timm import errors, inject
from ema_timm.backbones.cifar_resnet import cifar_resnet
from ema_timm.checkpoints.config import read_config
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.network import build_network
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.see import drawing
from ema_timm.see.attention import attend
from ema_timm.see.gates import attention_maps, layer_gates
from ema_timm.see.gradcam import Cam, grad_cam, last_stage
from ema_timm.see.images import prepare
from ema_timm.see.predictions import Prediction
from ema_timm.see.settings import AttendConfig

OBJECT = 12
"""Pixels on a side: three columns or rows of stripes, upright or lying, on noise."""


def stripes(images, size):
    """Noise with one striped square each; its class is the stripes' direction, its place known."""
    x, y = torch.randn(images, 3, size, size) * 0.5, torch.arange(images) % 2
    corners = torch.randint(0, size - OBJECT + 1, (images, 2))
    pattern = torch.tensor([2.0, 2.0, -2.0, -2.0]).repeat(OBJECT // 4).expand(OBJECT, OBJECT)
    for image, upright, (top, left) in zip(x, y == 0, corners.tolist(), strict=True):
        place = image[:, top : top + OBJECT, left : left + OBJECT]
        place.copy_(pattern if upright else pattern.t())
    return x, y, corners


@pytest.fixture(scope="module")
def looking():
    """A small EMA network that has learnt to tell the stripes apart."""
    torch.manual_seed(0)
    network = cifar_resnet(BasicBlock, (1, 1, 1, 1), num_classes=2, channels=(16, 24, 32, 48))
    model = inject(network, groups=8)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = 60
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        x, y, _ = stripes(32, 32)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def test_the_maximum_of_the_last_map_is_on_the_object(looking):
    """On images twice as large, where chance would hit in about one of ten."""
    x, y, corners = stripes(64, 64)
    with torch.no_grad():
        assert (looking(x).argmax(1) == y).float().mean() > 0.9
    maps = attention_maps(looking, x)["layer4.0.se"].mean(1)  # (64, 8, 8)
    cell = 64 // maps.shape[1]
    best = maps.flatten(1).argmax(1)
    low = torch.stack([best // maps.shape[2], best % maps.shape[2]], 1) * cell
    touches = ((low + cell > corners) & (low < corners + OBJECT)).all(1)
    assert touches.float().mean() > 0.95


def test_grad_cam_is_on_the_object_and_leaves_no_trace(looking):
    x, y, corners = stripes(8, 64)
    maps = grad_cam(looking, last_stage(looking), x, y.tolist())
    assert maps.shape == (8, 64, 64)
    inside = [
        each[top : top + OBJECT, left : left + OBJECT].mean() / each.mean()
        for each, (top, left) in zip(maps, corners.tolist(), strict=True)
    ]
    assert torch.stack(inside).median() > 2
    assert all(parameter.grad is None for parameter in looking.parameters())
    assert not any(module._forward_hooks for module in looking.modules())
    with pytest.raises(UserError, match="--cam-layer: ResNet has no module 'x'"):
        grad_cam(looking, "x", x, y.tolist())
    with pytest.raises(UserError, match="the output of fc is none"):
        grad_cam(looking, "fc", x, y.tolist())
    assert not any(module._forward_hooks for module in looking.modules())


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved."""
    saved, save = [], drawing.Figure.savefig

    def keep(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(drawing.Figure, "savefig", keep)
    return saved


def settings(source, images, output, **options):
    return AttendConfig(str(source), [*map(str, images)], str(output), device="cpu", **options)


def images_of(digits):
    return sorted((digits / "val").rglob("*.png"))[:2]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_attend_sees_sixteen_bits_as_evaluate_does(trained, digits, tmp_path):
    config = read_config(trained)
    data = preprocessing(build_network(trained, config), config.get("model_args", {}), {})
    file, deep = images_of(digits)[0], tmp_path / "deep.png"
    with Image.open(file) as image:
        in_mode(image.convert("L"), "I;16").save(deep)
    for one, other in zip(prepare([file], data), prepare([deep], data), strict=True):
        assert torch.equal(one, other)


def test_picture_has_a_row_an_image_and_a_column_a_stage(trained, digits, tmp_path, figures):
    files = images_of(digits)
    output = tmp_path / "new" / "attend.png"
    done = attend(settings(trained, files, output, groups=True))
    assert done.pictures == [output, output.with_name("attend-groups.png")]
    assert done.layers == [f"layer{stage}.0.se" for stage in (1, 2, 3, 4)]
    assert [row.filename for row in done.rows] == [str(file) for file in files]
    for picture in done.pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 500
    first, groups = figures
    # A panel an image and column, strips at the edges of the stages', two scales a stage, one of
    # Grad-CAM.
    assert len(first.axes) == 2 * (1 + 4 + 1) + 2 * 4 * 2 + 2 * 4 + 1
    assert len(groups.axes) == 2 * (1 + 4) + 4
    titles = "\n".join(texts(first))
    assert "layer1.0.se\n8×8, mean of 32 groups" in titles
    assert "Grad-CAM of test_resnet_ema\nat layer4" in titles
    assert "layer2.0.se\nall 24 groups, 4×4" in texts(groups)


def test_numbers_of_the_scale_are_those_of_the_maps(looking, tmp_path, figures):
    """One scale for all rows of a column, from its smallest to its largest number."""
    seen = torch.rand(2, 3, 64, 64)
    gates = {name: gate for name, gate in layer_gates(looking, seen).items() if "4" in name}
    rows = [Prediction("a.png", [0], ["a"], [0.9]), Prediction("b.png", [1], ["b"], [0.8])]
    drawing.save_attention(seen, gates, [], rows, tmp_path / "a.png")
    maps = gates["layer4.0.se"].gate_map.mean(1)
    numbers = [
        [float(label.get_text()) for label in axes.get_xticklabels()]
        for axes in figures[0].axes
        if axes.get_xticklabels()
    ]
    low, high = maps.min().item(), maps.max().item()
    assert numbers[0] == pytest.approx([low, (low + high) / 2, high], abs=0.006)
    drawn = [image for axes in figures[0].axes for image in axes.images]
    found = [torch.tensor(image.get_array()) for image in drawn]
    assert any(torch.equal(each, maps[1]) for each in found if each.shape == maps[1].shape)


def test_a_gate_a_channel_is_shown_as_the_mean_of_each_group():
    model = timm.create_model("test_resnet_ema", ema_cross_spatial=False, ema_groups=8)
    gates = layer_gates(model, torch.randn(2, 3, 64, 64))["layer1.0.se"]
    assert gates.gate_map.shape == (2, 32, 16, 16)
    maps = drawing.group_maps(gates)
    assert maps.shape == (2, 8, 16, 16)
    torch.testing.assert_close(maps[:, 1], gates.gate_map[:, 4:8].mean(1))


def test_constant_maps_and_a_class_with_nothing_for_it(tmp_path, figures):
    """The neutral start gates by one half everywhere; Grad-CAM can be zero everywhere."""
    model = inject(timm.create_model("test_resnet", num_classes=2))
    seen = torch.rand(1, 3, 64, 64)
    cam = Cam("twin", "layer4", seen, torch.zeros(1, 64, 64), [1], ["b"], [0.1])
    rows = [Prediction("a.png", [0], ["a"], [0.9])]
    drawing.save_attention(seen, layer_gates(model, seen), [cam], rows, tmp_path / "a.png")
    said = [axes.get_xlabel() for axes in figures[0].axes if axes.get_xlabel()]
    assert said == ["b: 10.0%, zero everywhere"]
    ticks = [label.get_text() for axes in figures[0].axes for label in axes.get_xticklabels()]
    assert ticks[:3] == ["0.4900", "0.5000", "0.5100"]


def plain_twin(folder, names):
    model = timm.create_model("test_resnet", num_classes=len(names))
    data = preprocessing(model, {}, {"img_size": 48})
    CheckpointWriter(folder).make()
    CheckpointWriter(folder).save_model(model, {}, data, names)
    return folder


def test_beside_a_plain_twin_both_are_of_the_same_class(trained, digits, tmp_path, figures):
    names = [f"digit_{i}" for i in range(4)]
    options = {"beside": str(plain_twin(tmp_path / "twin", names)), "target": "digit_2"}
    attend(settings(trained, images_of(digits), tmp_path / "a.png", **options))
    said = [axes.get_xlabel().split(":")[0] for axes in figures[0].axes if axes.get_xlabel()]
    assert said == ["digit_2"] * 4
    assert "Grad-CAM of test_resnet\nat layer4" in texts(figures[0])
    options = {"beside": str(plain_twin(tmp_path / "other", ["a", "b", "c", "d"]))}
    with pytest.raises(UserError, match="--beside takes a network of the same classes"):
        attend(settings(trained, images_of(digits), tmp_path / "a.png", **options))


def hide(monkeypatch, package):
    """Let a package look as if it were not installed."""
    find = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find(name))


def test_chosen_layers_without_grad_cam(trained, digits, tmp_path, monkeypatch):
    hide(monkeypatch, "pytorch_grad_cam")
    options = {"layers": "layer3.0.se, layer1.0.se", "cam": False}
    done = attend(settings(trained, images_of(digits), tmp_path / "a.png", **options))
    assert done.layers == ["layer3.0.se", "layer1.0.se"]
    with pytest.raises(
        UserError, match=r"leaves out\) needs grad-cam: pip install 'ema-timm\[see\]'"
    ):
        attend(settings(trained, images_of(digits), tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output": "a.pdf"}, r"--output is a \.png file, got a\.pdf"),
        (
            {"layers": "layer9.0.se"},
            "'layer9.0.se' is not an EMA attention layer. There are layer1.0.se, layer2",
        ),
        ({"target": "digit_7"}, "has no 'digit_7'. It has 4, such as 'digit_0'"),
        ({"target": "4"}, "has no '4'"),
        ({"target": "digit_1", "cam": False}, "--target is about Grad-CAM, which --no-cam"),
        ({"images": ["nowhere.png"]}, "there is no image or folder nowhere.png"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_said(trained, digits, tmp_path, options, match):
    given = {"images": images_of(digits), "output": tmp_path / "a.png", **options}
    with pytest.raises(UserError, match=match) as caught:
        attend(settings(trained, **given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("output", ["a.png", "link.png", "b.png"])
def test_an_image_is_never_replaced_by_the_figure(trained, digits, tmp_path, output):
    image = next((digits / "val").rglob("*.png"))
    for name in ("a.png", "b-groups.png"):
        shutil.copy(image, tmp_path / name)
    (tmp_path / "link.png").symlink_to("a.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b-groups.png")]
    with pytest.raises(UserError, match="is one of the images, which it would replace"):
        attend(settings(trained, images, tmp_path / output, groups=True))
    for each in images:
        assert Path(each).read_bytes() == image.read_bytes()


def test_command(trained, digits, tmp_path, capsys):
    image = shutil.copy(images_of(digits)[0], tmp_path / "one.png")
    output = tmp_path / "a.png"
    command = ["attend", trained, image, "--output", output, "--device", "cpu", "--no-cam"]
    assert main([str(part) for part in command]) == 0
    out, err = capsys.readouterr()
    name, _, best = out.strip().partition("\t")
    assert name == str(image)
    assert best.startswith("digit_")
    assert err == f"{output}: layer1.0.se, layer2.0.se, layer3.0.se, layer4.0.se\n"
    (tmp_path / "one.png").write_bytes(b"no image")
    assert main([str(part) for part in command]) == 2
    assert "one.png: not an image. Repair or remove it." in capsys.readouterr().err
