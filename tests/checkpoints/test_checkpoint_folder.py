"""What is published was read and checked first: every kind of damage is named, with a remedy."""

import io
import json
import re
import shutil
import struct

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

from ema_timm.checkpoints.cards.file import EditedCardError, write_card
from ema_timm.checkpoints.check import check_publishable
from ema_timm.checkpoints.config import STUB
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.errors import UserError
from ema_timm.files import sha256


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder as a training run leaves it; copy it before changing it."""
    folder = CheckpointWriter(tmp_path_factory.mktemp("checkpoint") / "run")
    folder.make()
    model = timm.create_model("test_resnet_ema", num_classes=3)
    data = {**resolve_data_config(model=model), "input_size": (3, 32, 32)}
    digest = folder.save_model(model, {}, data, ["cat", "dog", "emu"])
    results = {
        "format": 1,
        "architecture": "test_resnet_ema",
        "task": "image-classification",
        "weights_sha256": digest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": ["cat", "dog", "emu"],
        "input": data,
        "metrics": {"top1": 87.5, "top5": None, "loss": 0.4321, "correct": 7, "images": 8},
        "plots": ["confusion.png"],
    }
    folder.write_json("results.json", results)
    Image.new("RGB", (20, 20)).save(folder.path / "confusion.png")
    (folder.path / "training").mkdir()
    torch.save({"epoch": 1}, folder.path / "training" / "state.pt")
    (folder.path / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder.path / "notes.py").write_text("mine")
    write_card(folder.path)
    return folder.path


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "run")


def test_a_whole_folder_passes_and_names_what_is_published(folder):
    checked = check_publishable(folder)
    assert checked.files == (
        "model.safetensors", "config.json", "README.md", "results.json", STUB, "confusion.png",
    )  # fmt: skip
    assert checked.weights_sha256 == sha256(folder / "model.safetensors")
    assert checked.config["architecture"] == "test_resnet_ema"
    assert checked.results["metrics"]["correct"] == 7
    assert checked.card == (folder / "README.md").read_text()


def weights(change):
    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header(change):
    """Rewrite the header, as a file that was damaged or made up would have it."""

    def damage(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        head = json.loads(content[8 : 8 + size])
        change(head)
        text = json.dumps(head).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def edit(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def linked(name, inside=False):
    """The file moved away, and a link to it in its place; ``inside`` the folder, or out of it."""

    def damage(folder):
        moved = (folder if inside else folder.parent) / f"moved-{name}"
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)

    return damage


def card(text):
    """A card of somebody's own, and the pictures that it might mean."""

    def damage(folder):
        for place in (folder.parent / "x.png", folder / "x.png", folder / "pics" / "x.png"):
            place.parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 20)).save(place)
        (folder / "README.md").write_text(text.replace("HERE", str(folder)))

    return damage


def picture(content):
    return lambda folder: (folder / "confusion.png").write_bytes(content)


def swap_shape(head):
    head["fc.weight"]["shape"].reverse()


def encoded(kind):
    out = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(out, kind)
    return out.getvalue()


PLACES = {"opt": "sgd", "model_kwargs": {"cache_dir": "/home/me/cache"}}
PNG, JPEG = encoded("PNG"), encoded("JPEG")

DAMAGE = {
    "truncated": (truncated, r"model\.safetensors is damaged: .*Copy the file again"),
    "header length": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 40),
        r"model\.safetensors is damaged",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is missing"),
    "header lies of offsets": (
        header(lambda h: h["fc.bias"].update(data_offsets=[0, 8])),
        "is damaged",
    ),
    "header lies of the type": (
        header(lambda h: h["fc.bias"].update(dtype="I32")),
        r"fc\.bias is torch\.int32, and the network takes torch\.float32",
    ),
    "header lies of the shape": (header(swap_shape), r"fc\.weight is \(\d+, 3\), .* takes \(3,"),
    "a type half as wide": (header(lambda h: h["fc.bias"].update(dtype="F16")), "is damaged"),
    "integer weights": (
        weights(lambda t: t.update({"fc.weight": t["fc.weight"].int()})),
        r"fc\.weight is torch\.int32",
    ),
    "a float of another kind": (
        weights(lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)})),
        r"fc\.weight is torch\.float8",
    ),
    "NaN": (weights(lambda t: t["fc.weight"].view(-1)[0].fill_(torch.nan)), "holds 1 NaN"),
    "infinite": (weights(lambda t: t["fc.bias"].fill_(torch.inf)), "holds 3 NaN or infinite"),
    "a tensor gone": (weights(lambda t: t.pop("fc.bias")), r"lacks fc\.bias"),
    "a tensor more": (
        weights(lambda t: t.update(extra=torch.zeros(1))),
        "has extra. Put the config",
    ),
    "other weights": (
        weights(lambda t: t["fc.bias"].add_(1)),
        r"does not belong to model\.safetensors.*ema-timm evaluate",
    ),
    "another architecture": (
        edit("config.json", lambda c: c.update(architecture="resnet18_ema")),
        r"not of the network that config\.json names: it lacks .* has ",
    ),
    "without EMA": (
        edit("config.json", lambda c: c.update(architecture="test_resnet")),
        r"has layer1\.0\.se",
    ),
    "unknown architecture": (
        edit("config.json", lambda c: c.update(architecture="resnet18_emma")),
        r"cannot build resnet18_emma: Unknown model",
    ),
    "unknown argument": (
        edit("config.json", lambda c: c.update(model_args={"ema_gruops": 2})),
        "ema_gruops",
    ),
    "other classes": (
        edit("config.json", lambda c: c.update(num_classes=4)),
        r"label_names has 3 names \(cat, dog, emu\), but the network has 4 classes.*--labels FILE",
    ),
    "no architecture": (
        edit("config.json", lambda c: c.pop("architecture")),
        "architecture is missing",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config gone": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "num_classes twice": (
        edit("config.json", lambda c: c.update(model_args={"num_classes": 3})),
        r"not complete.*ema-timm card .* repairs it",
    ),
    "no auto_map": (edit("config.json", lambda c: c.pop("auto_map")), "not complete"),
    "no stub": (lambda f: (f / STUB).unlink(), "missing or altered"),
    "another stub": (lambda f: (f / STUB).write_text("import os"), "missing or altered"),
    "no results": (lambda f: (f / "results.json").unlink(), "is missing. Measure the weights"),
    "results of another": (
        edit("results.json", lambda r: r.update(architecture="resnet18_ema")),
        "is of resnet18_ema with 3 classes",
    ),
    "results of the future": (edit("results.json", lambda r: r.update(format=2)), "format 2"),
    "results without classes": (
        edit("results.json", lambda r: r.pop("classes")),
        "classes is missing",
    ),
    "no card": (lambda f: (f / "README.md").unlink(), r"README\.md is missing.*ema-timm card"),
    "an old card": (
        edit("results.json", lambda r: r["metrics"].update(correct=8, top1=100.0)),
        "not of these results",
    ),
    "a card that is no text": (
        lambda f: (f / "README.md").write_bytes(b"\xff"),
        r"README\.md cannot be read.*Rename or remove it, then write it with: ema-timm card",
    ),
    "a picture gone": (
        lambda f: (f / "README.md").write_text("# Mine\n![shown](gone.png)\n"),
        r"shows gone\.png, which is missing",
    ),
    "images of no size": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(input_size=[3, -5, 0])),
        r"input_size must be \[channels, height, width\].*got \[3, -5, 0\]",
    ),
    "images larger than memory": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(input_size=[3, 10**6, 10**6])),
        r"input_size must be .* from 1 to 10,000, got \[3, 1000000, 1000000\]",
    ),
    "a size that is no size": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(input_size="32")),
        "input_size must be .*got '32'",
    ),
    "a mean of words": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(mean=["a", 1, 2])),
        "mean must be numbers",
    ),
    "a deviation of none": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(std=[0, 1, 1])),
        "std must be numbers above 0",
    ),
    "a crop of nothing": (
        edit("config.json", lambda c: c["pretrained_cfg"].update(crop_pct=0)),
        "crop_pct must be a number above 0",
    ),
    "results of no size": (
        edit("results.json", lambda r: r["input"].update(input_size=[3, -5, 0])),
        r"results\.json: input_size must be",
    ),
    "arguments that are no arguments": (
        edit("config.json", lambda c: c.update(model_args=[1])),
        r"model_args must be an object, got \[1\]",
    ),
    "names that are no names": (
        edit("config.json", lambda c: c.update(label_names=3)),
        "label_names must be a list, got 3",
    ),
    "names of other classes": (
        edit("config.json", lambda c: c.update(label_names=["cat", "emu", "dog"])),
        r"names class 1 'dog', but label_names in config\.json names it 'emu'.*ema-timm evaluate",
    ),
    **{
        f"pretrained_cfg.{key}": (
            edit("config.json", lambda c, key=key: c["pretrained_cfg"].update({key: "/home/me/w"})),
            rf"pretrained_cfg\.{key}.*ema-timm card .* repairs it",
        )
        for key in ("file", "url", "hf_hub_id")
    },
    **{
        f"model_args.{key}": (
            edit("config.json", lambda c, key=key: c.update(model_args={key: "/home/me/w"})),
            rf"model_args\.{key}.*ema-timm card .* repairs it",
        )
        for key in ("cache_dir", "checkpoint_path")
    },
    "results that say where files were": (
        edit("results.json", lambda r: r.update(arguments=PLACES)),
        r"results\.json holds local paths .*arguments\.model_kwargs.*ema-timm card .* removes them",
    ),
    **{
        f"{name} a link": (linked(name), rf"{re.escape(name)} is a link.*cp -rL")
        for name in ("model.safetensors", "config.json", "results.json", "README.md", STUB)
    },
    "a picture a link": (linked("confusion.png"), r"confusion\.png is a link.*cp -rL"),
    "a link that stays inside": (linked("confusion.png", inside=True), "is a link"),
    "a picture above the folder": (card("![](../x.png)"), r"shows \.\./x\.png, .* card's folder"),
    "a picture by its place": (card("![](HERE/x.png)"), r"shows /.*/x\.png, but .* card's folder"),
    "a picture in a folder": (card("![](pics/x.png)"), r"shows pics/x\.png, but .* card's folder"),
    "a picture in a folder, as HTML": (card('<img width=9 src="pics/x.png">'), "shows pics/x"),
    "a picture by a file's address": (card("![](file:///x.png)"), "shows file:///x.png"),
    "a picture by reference": (card("![a][b]\n\n[b]: pics/x.png 'c'\n"), "shows pics/x.png"),
    "a titled picture gone": (card('![a](gone.png "a")'), r"shows gone\.png, which is missing"),
    "a picture that is none": (picture(b"secret"), r"confusion\.png is not a PNG image"),
    "half a picture": (picture(PNG[: len(PNG) // 2]), r"confusion\.png is not a PNG image"),
    "a picture of another kind": (picture(JPEG), r"confusion\.png is not a PNG image"),
    "a picture without a kind": (
        card("![](notes.py)"),
        r"shows notes\.py.*\.png, \.jpg, \.jpeg, \.gif or \.webp",
    ),
    "results name a picture elsewhere": (
        edit("results.json", lambda r: r.update(plots=["../x.png"])),
        r"results\.json names \.\./x\.png",
    ),
    "results name a picture that is gone": (
        edit("results.json", lambda r: r.update(plots=["gone.png"])),
        r"gone\.png",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(folder, case):
    damage, said = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        check_publishable(folder)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        check_publishable(tmp_path / "nowhere")


def test_an_edited_card_passes(folder):
    (folder / "README.md").write_text("# Mine\n![](confusion.png) ![](https://x.test/a.png)\n")
    assert check_publishable(folder).card.startswith("# Mine")


def test_pictures_that_neither_card_nor_results_name_stay(folder):
    (folder / "stray.png").write_bytes(b"what somebody put there")
    (folder / "me.jpg").symlink_to("/etc/hostname")
    checked = check_publishable(folder)
    assert checked.skipped == ("me.jpg", "stray.png")
    assert not {"me.jpg", "stray.png"} & set(checked.files)


def test_pictures_that_a_card_of_ones_own_shows_go_along(folder):
    for name in ("a b.png", "c.jpg", "d.webp", "e.gif"):
        Image.new("RGB", (20, 20)).save(folder / name)
    (folder / "README.md").write_text(
        "![](a%20b.png) ![c](./c.jpg 'title') <img alt=d src='d.webp'> ![](https://x.test/y/z.png)"
        "\n![e](<e.gif>) `![](code.png)`\n```\n![](more/code.png)\n```\n"
    )
    pictures = {"confusion.png", "a b.png", "c.jpg", "d.webp", "e.gif"}
    assert pictures < set(check_publishable(folder).files)


def test_the_card_command_repairs_the_config(folder):
    edit("config.json", lambda c: c.update(model_args={"num_classes": 3}, auto_map={}))(folder)
    (folder / STUB).unlink()
    assert not write_card(folder).changed  # the card itself is as it was
    assert check_publishable(folder)


def test_the_card_command_takes_out_where_files_were(folder):
    """Also where somebody has edited the card, which it keeps."""

    def places(config):
        config["pretrained_cfg"].update(file="/home/me/w.pth", url="https://x.test/w.pth")
        config["model_args"] = {"cache_dir": "/home/me/cache", "ema_groups": 32}

    edit("config.json", places)(folder)
    edit("results.json", lambda r: r.update(arguments=PLACES))(folder)
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(EditedCardError):
        write_card(folder)
    checked = check_publishable(folder)
    assert "/home" not in json.dumps([checked.config, checked.results])
    assert checked.config["model_args"] == {"ema_groups": 32}
    assert checked.results["arguments"] == {"opt": "sgd", "model_kwargs": {}}
    assert checked.card == "# Mine\n"
