"""A checkpoint is measured as timm measures it, and what is published is what was measured."""

import argparse
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

import ema_timm.measure.evaluation as evaluate_module
import ema_timm.publishing
from ema_timm.checkpoints.cards.file import write_card
from ema_timm.checkpoints.check import check_publishable
from ema_timm.checkpoints.config import read_config
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.files import sha256
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def weights(trained):
    return load_file(f"{trained}/model.safetensors")


def arguments(**changes):
    """What timm's train script saves of its command line, as far as it matters here."""
    given = {"model": "test_resnet_ema", "img_size": 32, "pretrained": False, "opt": "sgd"}
    given |= {"data_dir": "/home/me/digits", "crop_pct": None, "mean": None, "in_chans": None}
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def checkpoint(weights, tmp_path):
    """model_best.pth.tar, as timm's train script writes it; its averaged weights are all 0."""
    file = tmp_path / "model_best.pth.tar"
    averaged = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    content = {"epoch": 2, "arch": "test_resnet_ema", "args": arguments(), "metric": 50.0}
    content |= {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    torch.save({**content, "state_dict_ema": averaged, "optimizer": {"lr": 0.1}}, file)
    return file


def run(source, digits, **changes):
    options = {"data_dir": str(digits), "device": "cpu", "workers": 0, **changes}
    return evaluate(EvaluateConfig(str(source), **options), progress=False)


def timms_own_count(folder, digits):
    """Correct and in-top-5 images, by timm's dataset, loader and accuracy."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = resolve_data_config(model=model, use_test_size=True)
    dataset = create_dataset(root=str(digits), name="", split="val")
    loader = create_loader(
        dataset, batch_size=7, use_prefetcher=True, num_workers=0, device=torch.device("cpu"),
        persistent_workers=False, **data,
    )  # fmt: skip
    correct = 0
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm leaves image files open
        for images, targets in loader:
            top1 = accuracy(model(images), targets, topk=(1,))[0]
            correct += round(float(top1) * len(targets) / 100)
    return {"correct": correct, "images": len(dataset)}


def test_a_folder_is_measured_as_timm_measures_it(folder, digits):
    before = json.loads((folder / "results.json").read_text())
    results = run(folder, digits)
    metrics = results["metrics"]
    counts = timms_own_count(folder, digits)
    assert {key: metrics[key] for key in counts} == counts
    assert 25 < metrics["top1"] < 100  # neither chance nor a trivial task
    assert metrics["loss"] == pytest.approx(before["history"][before["best_epoch"] - 1]["loss"])
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for key in ("history", "arguments", "base", "best_epoch", "data", "versions"):
        assert results[key] == before[key], key  # the training's facts are carried on


def test_the_counts_agree_with_each_other(folder, digits):
    results = run(folder, digits)
    classes = results["evaluation"]["per_class"]
    assert list(classes) == results["classes"]
    assert sum(c["images"] for c in classes.values()) == results["metrics"]["images"] == 23
    assert sum(c["correct"] for c in classes.values()) == results["metrics"]["correct"]
    by_hand = {p.name: len(list(p.iterdir())) for p in (digits / "val").iterdir()}
    assert {name: c["images"] for name, c in classes.items()} == by_hand
    with Image.open(folder / "confusion.png") as picture:
        assert picture.format == "PNG"
    assert results["plots"] == ["confusion.png", "curves.png"]


def test_the_results_say_how_it_was_measured(folder, digits):
    results = run(folder, digits, amp_dtype="bfloat16", batch_size=5)
    how = results["evaluation"]
    assert (how["dtype"], how["amp_dtype"], how["device"]) == ("float32", "bfloat16", "cpu")
    assert how["data"]["split"] == "val" and how["data"]["name"] == digits.name
    assert how["data"]["fingerprint"] == results["data"]["val"]["fingerprint"]
    assert set(how["versions"]) == {"ema_timm", "timm", "torch", "python"}
    assert results["weights_sha256"] == sha256(folder / "model.safetensors")
    assert results["input"]["input_size"] == (3, 32, 32)
    assert results["macs"]["total"] > results["macs"]["ema"] > 0
    assert "/home" not in json.dumps(results) and str(digits.parent) not in json.dumps(results)


def test_a_measured_folder_gets_its_card_and_passes(folder, digits):
    results = run(folder, digits)
    assert write_card(folder).changed
    card = check_publishable(folder).card
    assert f"({results['metrics']['correct']} of 23)" in card
    assert "![confusion matrix](confusion.png)" in card and "![loss and accuracy]" in card
    assert "The epoch was chosen on the same images" in card


@pytest.mark.parametrize("form", ["checkpoint", "safetensors", "state dict"])
def test_a_file_becomes_a_folder_with_the_same_numbers(
    form, checkpoint, weights, folder, digits, tmp_path
):
    more, source = {"model": "test_resnet_ema", "img_size": 32}, tmp_path / "weights.safetensors"
    if form == "checkpoint":
        more, source = {"use_averaged": False}, checkpoint
    elif form == "safetensors":
        save_file(weights, source)
    else:
        source = tmp_path / "weights.pth"
        torch.save(weights, source)
    output = tmp_path / "out"
    results = run(source, digits, output=str(output), **more)
    assert results["metrics"] == run(folder, digits)["metrics"]
    assert results["classes"] == ["digit_0", "digit_1", "digit_2", "digit_3"]
    assert results["checkpoint"] == {"file": source.name, "averaged": False}
    if form == "checkpoint":
        assert results["epoch"] == 3 and results["arguments"]["data_dir"] == "digits"
        assert results["base"]["weights"] == "random start"
    write_card(output)
    checked = check_publishable(output)
    assert set(checked.files) == {p.name for p in output.iterdir()}
    assert timms_own_count(output, digits)["correct"] == results["metrics"]["correct"]


@pytest.mark.parametrize("option", [[], ["--use-averaged"], ["--no-use-averaged"]], ids=str)
def test_the_command_says_which_weights_it_measures(option, checkpoint, digits, tmp_path, capsys):
    args = ["evaluate", checkpoint, "--data-dir", digits, "--output", tmp_path / "out", *option]
    assert main([*map(str, args), "--device", "cpu", "--workers", "0"]) == 0
    raw = option == ["--no-use-averaged"]
    this, other = ("trained", "--use-averaged") if raw else ("averaged", "--no-use-averaged")
    said = capsys.readouterr().err
    assert f"model_best.pth.tar: took its {this} weights" in said and f"with {other}" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"]["averaged"] is not raw


def test_averaged_weights_are_what_timm_loads(checkpoint, digits, tmp_path):
    results = run(checkpoint, digits, output=str(tmp_path / "out"))
    assert results["checkpoint"]["averaged"] is True
    assert not any(t.any() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert results["metrics"]["loss"] == pytest.approx(1.3862943)  # log 4: all weights are 0


def test_arguments_of_the_training_decide_as_in_validate(weights, digits, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "last.pth.tar")
    (tmp_path / "args.yaml").write_text("model: test_resnet_ema\nimg_size: 40\ncrop_pct: 0.8\n")
    results = run(tmp_path / "last.pth.tar", digits, output=str(tmp_path / "a"))
    assert results["input"]["input_size"] == (3, 40, 40)
    assert results["input"]["crop_pct"] == 0.8
    told = {"img_size": 48, "interpolation": "nearest", "output": str(tmp_path / "b")}
    results = run(tmp_path / "last.pth.tar", digits, **told)
    assert results["input"]["input_size"] == (3, 48, 48)
    assert results["input"]["interpolation"] == "nearest"
    cfg = json.loads((tmp_path / "b" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], cfg["interpolation"]) == ([3, 48, 48], "nearest")


def test_greyscale_weights_and_described_labels(digits, tmp_path):
    model = timm.create_model("test_resnet_ema", num_classes=4, in_chans=1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    names = {f"digit_{i}": f"the figure {i}" for i in range(4)}
    (tmp_path / "labels.json").write_text(json.dumps(names))
    told = {"model": "test_resnet_ema", "img_size": 32, "output": str(tmp_path / "out")}
    run(tmp_path / "w.safetensors", digits, labels=str(tmp_path / "labels.json"), **told)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_descriptions"] == names
    assert config["label_names"] == list(names)
    assert config["model_args"]["in_chans"] == 1


def test_results_of_other_weights_are_put_aside(folder, digits):
    weights = load_file(folder / "model.safetensors")
    write_card(folder, {"license": "mit"})
    save_file({name: t * 0 if "fc" in name else t for name, t in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    results = run(folder, digits)
    assert "history" not in results and results["card"] == {"license": "mit"}
    assert "history" in json.loads((folder / "results.previous.json").read_text())


def test_without_matplotlib_there_is_no_picture_and_the_card_shows_none(
    folder, digits, monkeypatch
):
    run(folder, digits)
    monkeypatch.setattr(evaluate_module, "save_confusion", None)
    assert "confusion.png" not in run(folder, digits)["plots"]
    assert not (folder / "confusion.png").exists()
    write_card(folder)
    assert "confusion" not in (folder / "README.md").read_text()


def test_class_names_in_any_script_are_drawn_without_a_warning(tmp_path):
    from ema_timm.measure.confusion import save_confusion

    for index, names in enumerate((["$a$", "b_$"], ["猫", "狗"], ["x" * 80, "Ä|é"], ["a"] * 40)):
        counts = torch.eye(len(names), dtype=torch.long)
        save_confusion(counts, names, tmp_path / f"{index}.png")
        with Image.open(tmp_path / f"{index}.png") as picture:
            assert min(picture.size) > 200


def test_a_folder_that_cannot_be_written_to_is_said_before_the_measurement(
    folder, digits, monkeypatch
):
    def refuse(self, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evaluate_module, "tally", None)  # not reached
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system"):
        run(folder, digits)


def test_an_evaluation_that_is_killed_loses_nothing_of_the_results_before(
    folder, digits, weights, monkeypatch
):
    """Of other weights: what was told for the card is taken over by whichever call ends."""
    write_card(folder, {"license": "mit"})
    save_file(
        {k: v + 0 if k != "fc.bias" else v + 1 for k, v in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluate_module, "describe", killed)
        run(folder, digits)
    assert (folder / "results.json").is_file()
    assert run(folder, digits)["card"] == {"license": "mit"}


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint was run')",))


BAD_FILES = {
    "runs code": (
        lambda p, w: torch.save({"state_dict": w, "args": Evil()}, p),
        r"is refused: loading it would run \S*exec",
    ),
    "a whole model": (
        lambda p, w: torch.save(timm.create_model("test_resnet_ema"), p),
        r"is refused: loading it would run timm\.models\.resnet\.ResNet",
    ),
    "a pickle of another kind": (
        lambda p, w: p.write_bytes(pickle.dumps({"a": Evil()}, protocol=2)),
        "exec",
    ),
    "truncated": (
        lambda p, w: (torch.save(w, p), p.write_bytes(p.read_bytes()[:5000])),
        "cannot be read",
    ),
    "empty": (lambda p, w: p.write_bytes(b""), "cannot be read"),
    "code": (lambda p, w: p.write_text("print(1)"), r"is not a checkpoint of tensors.*operand 112"),
    "text": (lambda p, w: p.write_text("hello"), "cannot be read"),
    "no weights": (lambda p, w: torch.save({"epoch": 1}, p), "it has no state dict"),
    "a list": (lambda p, w: torch.save([1], p), "it has no state dict"),
    "unknown network": (
        lambda p, w: torch.save({"state_dict": w, "arch": "resnet"}, p),
        "no model 'resnet'. Give it as --model",
    ),
    "says no network": (lambda p, w: torch.save(w, p), "does not name its network"),
    "other network": (
        lambda p, w: torch.save({"state_dict": w, "arch": "resnet18_ema"}, p),
        "is not of resnet18_ema: it lacks .* Give the --model of these weights",
    ),
    "NaN": (
        lambda p, w: torch.save(
            {"state_dict": {**w, "fc.bias": w["fc.bias"] * torch.nan}, "args": arguments()}, p
        ),
        r"fc\.bias holds 4 NaN",
    ),
    "no classifier": (
        lambda p, w: torch.save(
            {"state_dict": {k: v for k, v in w.items() if "fc" not in k}, "args": arguments()}, p
        ),
        "holds no classifier",
    ),
    "other classes": (
        lambda p, w: torch.save(
            {
                "state_dict": {**w, "fc.bias": torch.zeros(9), "fc.weight": torch.zeros(9, 96)},
                "args": arguments(),
            },
            p,
        ),
        "has 9 classes, but .* names 4",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_get_one_line_and_leave_nothing(case, weights, digits, tmp_path, capsys):
    write, said = BAD_FILES[case]
    file = tmp_path / "model.pth.tar"
    write(file, weights)
    with pytest.raises(UserError, match=said) as error:
        run(file, digits, output=str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_averaged": True}, "it has no averaged weights"),
        ({"output": ""}, "--output FOLDER says where"),
        ({"model_kwargs": {"ema_gruops": 2}}, "ema_gruops"),
        ({"data_dir": ""}, "needs --data-dir"),
        ({"split": "test"}, "has no folder test"),
        ({"labels": "gone.txt"}, "--labels: gone.txt cannot be read"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"device": "cuda:99"}, "--device cuda:99"),
    ],
    ids=lambda c: c if isinstance(c, str) else next(iter(c)),
)
def test_bad_options_get_one_line(changes, said, weights, digits, tmp_path):
    file = tmp_path / "model.pth.tar"
    torch.save({"state_dict": weights, "args": arguments()}, file)
    with pytest.raises(UserError, match=said):
        run(file, digits, **{"output": str(tmp_path / "out"), **changes})


def test_a_class_map_needs_the_names_in_its_order(weights, digits, tmp_path):
    content = {"state_dict": weights, "args": arguments(class_map="map.txt")}
    torch.save(content, tmp_path / "best.pth.tar")
    with pytest.raises(UserError, match=r"--class-map map\.txt.*--labels FILE"):
        run(tmp_path / "best.pth.tar", digits, output=str(tmp_path / "out"))


def test_a_plain_network_becomes_a_folder_without_a_stub(digits, tmp_path):
    model = timm.create_model("test_resnet", num_classes=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    output = tmp_path / "out"
    run(tmp_path / "w.safetensors", digits, model="test_resnet", img_size=32, output=str(output))
    write_card(output)
    checked = check_publishable(output)
    assert "auto_map" not in checked.config and len(checked.files) == 5
    assert "pip install timm" in checked.card and "ema-attention" not in checked.card


def test_a_name_that_two_classes_have_is_no_class_of_a_folder(folder, digits):
    """The images of one folder would count for the last of them."""
    config = json.loads((folder / "config.json").read_text())
    config["label_names"][2] = "digit_1"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"label_names names 'digit_1' twice\. Give each class"):
        run(folder, digits)


def test_a_folder_takes_no_options_of_a_file(folder, digits):
    with pytest.raises(UserError, match=r"--img-size is for checkpoint files"):
        run(folder, digits, img_size=64)
    with pytest.raises(UserError, match=r"--use-averaged is for checkpoint files"):
        run(folder, digits, use_averaged=False)


def test_a_folder_with_a_pickle_says_how_to_save_it(weights, tmp_path, digits):
    """timm's save_for_hf writes a pickle by default."""
    model = timm.create_model("test_resnet_ema", num_classes=4)
    model.load_state_dict(weights)
    timm.models.save_for_hf(model, tmp_path / "own")
    said = (
        r"holds a pickle, pytorch_model\.bin\..*'\S+/own', safe_serialization=True\).*--model NAME"
    )
    for use in (lambda: run(tmp_path / "own", digits), lambda: write_card(tmp_path / "own")):
        with pytest.raises(UserError, match=said):
            use()
    timm.models.save_for_hf(model, tmp_path / "own", safe_serialization=True)
    args = {"labels": str(tmp_path / "names.txt")}
    (tmp_path / "names.txt").write_text("digit_0\ndigit_1\ndigit_2\ndigit_3\n")
    assert run(tmp_path / "own", digits, **args)["metrics"]["images"] == 23
    del args["labels"]
    source = tmp_path / "own" / "pytorch_model.bin"  # the other way that the error names
    args |= {"model": "test_resnet_ema", "output": str(tmp_path / "new")}
    assert run(source, digits, **args)["metrics"]["images"] == 23


def test_a_folder_that_holds_a_checkpoint_is_not_written_over(checkpoint, folder, digits):
    before = sha256(folder / "model.safetensors")
    with pytest.raises(UserError, match="holds a checkpoint already"):
        run(checkpoint, digits, output=str(folder))
    assert sha256(folder / "model.safetensors") == before


def test_the_namespace_is_the_only_class_allowed(tmp_path):
    torch.save({"w": torch.ones(1), "args": arguments()}, tmp_path / "ok.pth")
    with pytest.raises(UserError, match="no state dict"):  # read, and it holds more than tensors
        read_checkpoint(tmp_path / "ok.pth")
    torch.save({"w": torch.ones(1), "args": pytest.approx(1)}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="is refused"):
        read_checkpoint(tmp_path / "bad.pth")


def test_the_command(folder, digits, capsys):
    args = ["evaluate", str(folder), "--data-dir", str(digits), "--workers", "0"]
    assert main([*args, "--device", "cpu"]) == 0
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert f"top-1 {metrics['top1']:.2f}% of 23 images" in capsys.readouterr().out
    assert main(["card", str(folder)]) == 0
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("README.md: unchanged\n")
    assert main(["evaluate", str(folder / "gone"), "--data-dir", "x"]) == 2


@pytest.fixture
def saved_by_transformers(folder, tmp_path):
    """The folder as transformers' Trainer saves it, which was told of other classes."""
    transformers = pytest.importorskip("transformers")

    def saved(**labels):
        config = transformers.AutoConfig.from_pretrained(folder, **labels)
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True
        )
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return saved


@pytest.mark.filterwarnings("ignore")  # transformers warns about its own parts
def test_a_folder_of_transformers_has_the_names_of_the_guides_recipe(saved_by_transformers):
    names = ["e", "d", "c", "b", "a"]
    labels = {"label_names": names, "num_labels": 5, "id2label": dict(enumerate(names))}
    place = saved_by_transformers(**labels)
    assert read_config(place)["label_names"] == names
    assert timm.create_model(f"local-dir:{place}", pretrained=True).num_classes == 5
    guide = Path(ema_timm.publishing.__file__).with_name("README.md").read_text("utf-8")
    recipe = re.search(r"config = AutoConfig\.from_pretrained\((.*?)\n\)", guide, re.S)[1]
    assert all(f"{name}=" in recipe for name in labels)


@pytest.mark.filterwarnings("ignore")  # transformers warns about its own parts
def test_a_folder_whose_names_are_of_other_classes_takes_those_of_labels(
    saved_by_transformers, digits, tmp_path, capsys
):
    place = saved_by_transformers(num_labels=5)
    said = (
        r"label_names has 4 names \(digit_0, digit_1, digit_2, digit_3\), but the network has 5 "
        r"classes\. Give 5 names .*ema-timm evaluate \S+ --data-dir DIR --labels FILE"
    )
    for use in (lambda: run(place, digits), lambda: write_card(place)):
        with pytest.raises(UserError, match=said):
            use()
    assert main(["predict", str(place), str(digits / "val")]) == 2
    assert "--labels FILE" in capsys.readouterr().err
    labels = tmp_path / "names.txt"
    labels.write_text("digit_3\ndigit_2\ndigit_1\ndigit_0\n")
    with pytest.raises(UserError, match=r"has 5 classes, but .*names\.txt names 4"):
        run(place, digits, labels=str(labels))
    names = ["digit_3", "digit_2", "digit_1", "digit_0", "other"]
    labels.write_text("\n".join(names))
    assert run(place, digits, labels=str(labels))["classes"] == names
    assert read_config(place)["label_names"] == names
    assert run(place, digits)["classes"] == names  # the folder has them now
    write_card(place)
