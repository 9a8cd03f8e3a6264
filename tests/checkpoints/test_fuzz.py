"""Whatever files of others hold, the outcome is a result or a clear error, never a traceback."""

import argparse
import copy
import json
import os
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ema_timm.bench.report.kinds import measurement
from ema_timm.checkpoints.cards.file import write_card
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.check import check_publishable
from ema_timm.checkpoints.config import read_config
from ema_timm.checkpoints.labels import read_labels
from ema_timm.checkpoints.network import open_network
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.checkpoints.results import read_results
from ema_timm.checkpoints.write import write_converted
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.fields import check_fields, load_json, load_yaml
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.ops.gpu.choice_file import Records, read_file
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model

# PyTorch and timm warn about odd sizes.
pytestmark = pytest.mark.filterwarnings("ignore")

DEEP = 200_000
TEXTS = st.sampled_from(
    ["", "os.system", "../x", "a\nb", "\ud800", "ema", "1e999", "💥", "x" * 999]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**63, 10**400, 10**9])
    | st.floats()
    | TEXTS
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def places(content, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in list(items)[:12]:
            yield from places(value, (*path, key))


@st.composite
def changed(draw, content):
    """A JSON value with other values, or without some."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(content))))
        if not path:
            continue
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        change = draw(st.sampled_from(["value", "null", "removed"]))
        if change == "removed" and isinstance(inner, dict):
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw(VALUES) if change == "value" else None
    return content


def is_clear(error):
    """A message of one line that says something."""
    text = str(error)
    return "\n" not in text.strip() and 20 < len(text) < 3000


def outcome(*calls):
    """Call each, if the one before did not raise."""
    for call in calls:
        try:
            call()
        except UserError as error:
            assert is_clear(error), repr(str(error))


@pytest.fixture(scope="module")
def folder(trained, digits, tmp_path_factory):
    """A trained and measured folder, whose files hold all that there may be."""
    place = shutil.copytree(trained, tmp_path_factory.mktemp("fuzz") / "run")
    evaluate(EvaluateConfig(str(place), str(digits), device="cpu", workers=0), progress=False)
    write_card(place, {"license": "mit", "datasets": ["ada/flowers"]})
    return place


@pytest.fixture(scope="module")
def good(folder):
    """The files of the folder as they were."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def restore(folder, good, name, content):
    for other, whole in good.items():
        (folder / other).write_bytes(whole)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, "utf-8")


def test_config_json(folder, good):
    whole = json.loads(good["config.json"])
    whole |= {"label_descriptions": {"digit_0": "zero"}, "model_args": {"ema_groups": 8}}

    @fuzz(150)
    @given(changed(whole))
    @example({**whole, "model_args": None, "label_descriptions": None, "auto_map": None})
    @example({**whole, "model_args": {"act_layer": "os.system"}})
    @example({**whole, "model_args": {"layers": [10**6, 1, 1, 1]}})
    @example({**whole, "label_names": ["a", "b"]})
    @example({**whole, "label_names": ["a", "b", ["c"], {}]})
    @example("[" * DEEP)
    @example('{"a":' * DEEP)
    @example("1" * 10_000)
    def check(content):
        restore(folder, good, "config.json", content)
        outcome(
            lambda: open_network(folder),
            lambda: create_model(InitialModel(f"local-dir:{folder}", {}), 3),
            lambda: write_card(folder),
            lambda: check_publishable(folder),
        )

    check()
    restore(folder, good, "config.json", good["config.json"].decode())


REQUIRED = ("format", "architecture", "weights_sha256", "parameters", "classes", "input")


def test_results_json(folder, good):
    whole = json.loads(good["results.json"])

    @fuzz(200)
    @given(changed(whole))
    @example({name: whole[name] if name in REQUIRED else None for name in whole})
    @example({**whole, "data": {"train": None, "val": None}})
    @example({**whole, "metrics": 5})
    @example({**whole, "evaluation": "x"})
    @example({**whole, "card": ["mit"]})
    @example({**whole, "parameters": True})
    @example("[" * DEEP)
    def check(content):
        restore(folder, good, "results.json", content)
        file = folder / "results.json"
        outcome(lambda: card_text(read_results(file)), lambda: write_card(folder, force=True))

    check()
    restore(folder, good, "results.json", good["results.json"].decode())


NAMES = VALUES | st.lists(TEXTS) | st.dictionaries(st.text(max_size=5), st.text(max_size=5))


@fuzz(300)
@given(content=NAMES.map(json.dumps) | st.text() | st.binary())
@example(content="[" * DEEP)
@example(content='["a", "a"]')
@example(content='{"a": 1}')
@example(content='["\\ud800"]')
def test_a_file_of_labels(content, tmp_path):
    for name in ("labels.json", "labels.txt"):
        data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        (tmp_path / name).write_bytes(data)
        outcome(lambda name=name: read_labels(tmp_path / name))


ARGUMENTS = {
    "model": "test_resnet_ema",
    "img_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "",
    "crop_pct": None,
    "crop_mode": "center",
    "model_kwargs": {"ema_groups": 32},
    "gp": None,
    "data_dir": "flowers",
    "pretrained": False,
    "initial_checkpoint": "",
    "epochs": 3,
}


@fuzz(100)
@given(content=changed(ARGUMENTS))
@example(content={**ARGUMENTS, "interpolation": "os.system"})
@example(content={**ARGUMENTS, "mean": [0.5]})
@example(content={**ARGUMENTS, "model": ["resnet18"]})
def test_arguments_of_timms_train_script(content, weights, tmp_path):
    """In the checkpoint itself, and in the args.yaml beside it."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    args = argparse.Namespace(**{str(k): v for k, v in content.items()})
    torch.save({"state_dict": weights, "args": args}, tmp_path / "w.pt")
    (tmp_path / "args.yaml").write_text(json.dumps(content))  # JSON is YAML
    torch.save({"state_dict": weights}, tmp_path / "beside.pt")
    outcome(
        lambda: write_converted(tmp_path / "w.pt", tmp_path / "out"),
        lambda: read_checkpoint(tmp_path / "beside.pt"),
    )


@pytest.fixture(scope="module")
def weights():
    import timm

    return timm.create_model("test_resnet_ema", num_classes=3).state_dict()


LAUGHS = [
    f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in zip("xbcdefg", "bcdefgh", strict=True)
]
YAMLS = [
    "[" * DEEP,
    "- " * DEEP,
    "a: !!int ''",
    "a: !!timestamp x",
    "a: !!python/object/apply:os.system [id]",
    "2020-01-01: 3",
    "a: 2020-13-45",
    "? [a]\n: b",
    "a: &a [*a]",
    "a: &x [1,1,1,1,1,1,1,1]\n" + "".join(LAUGHS),
    "a: b: c",
    "\x00",
    "model: [resnet18]",
    "- 1",
]  # fmt: skip


@pytest.mark.parametrize("text", YAMLS, ids=lambda text: repr(text[:12]))
def test_yaml_that_is_no_mapping_of_plain_values(text, weights, tmp_path):
    (tmp_path / "args.yaml").write_text(text)
    torch.save({"state_dict": weights}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"args\.yaml.*Repair or remove it\.$") as error:
        read_checkpoint(tmp_path / "w.pt")
    assert is_clear(error.value)


@fuzz(300)
@given(content=st.text(alphabet=st.sampled_from("ab:-[]{}&*!#|>'\"\n\t ,?%@0.")) | st.binary())
def test_any_yaml(content, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "a.yaml").write_bytes(data)
    try:
        load_yaml(tmp_path / "a.yaml")
    except ValueError as error:
        assert str(error)


ENVIRONMENT = {"device": "cpu"}
LAYER = {
    "batch": 1, "channels": 8, "groups": 2, "height": 4, "width": 4, "dtype": "float32",
    "layout": "contiguous", "training": True,
}  # fmt: skip
CHOICES = {
    "environment": ENVIRONMENT,
    "disabled": {"fused": "why"},
    "layers": [{"layer": LAYER, "chosen": "closed_form", "candidates": {"fused": {"state": "ok"}}}],
}


@fuzz(400)
@given(content=changed(CHOICES))
@example(content="[" * DEEP)
@example(
    content={**CHOICES, "layers": [{**CHOICES["layers"][0], "layer": {**LAYER, "batch": 10**30}}]}
)
def test_choices_that_are_damaged_count_as_none(content, tmp_path):
    file = tmp_path / "choices.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert isinstance(read_file(file, ENVIRONMENT), Records)


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, "{", "\xff", "[]", '{"bench": []}'])
def test_files_that_options_name(text, folder, digits, tmp_path, capsys):
    file = tmp_path / "file.json"
    file.write_text(text, "latin-1")
    run = ["finetune", "--model", "test_resnet", "--data-dir", str(digits), "--no-pretrained"]
    run += ["--output", str(tmp_path / "run"), "--workers", "0", "--batch-size", "12"]
    assert main([*run, "--class-weights", str(file)]) == 2
    assert main(["evaluate", str(folder), "--data-dir", str(digits), "--labels", str(file)]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ema-timm: ")]
    assert len(lines) == 2 and all(str(file) in line for line in lines)
    with pytest.raises(UserError, match=r"is not a measurement"), measurement(file) as content:
        content["bench"].lower()


def test_an_error_names_file_and_field(folder, good):
    for name, change, said in (
        ("results.json", {"metrics": {"top1": "x"}}, r"metrics\.top1 must be a number, got 'x'"),
        ("results.json", {"plots": ["a.png", 3]}, r"plots\[1\] must be text, got 3"),
        ("results.json", {"parameters": True}, "parameters must be a whole number, got True"),
        ("config.json", {"model_args": [1]}, r"model_args must be an object, got \[1\]"),
        ("config.json", {"label_names": ["a", None]}, r"label_names\[1\] must be text, got None"),
    ):
        restore(folder, good, name, {**json.loads(good[name]), **change})
        read = read_results if name == "results.json" else lambda file: read_config(file.parent)
        with pytest.raises(UserError, match=rf"{name}: {said}\. [A-Z]"):
            read(folder / name)
        restore(folder, good, name, good[name].decode())
    restore(folder, good, "results.json", {})
    with pytest.raises(UserError, match=r"results\.json: architecture is missing\."):
        read_results(folder / "results.json")
    restore(folder, good, "results.json", good["results.json"].decode())


def test_fields_that_are_not_listed_may_be_anything():
    check_fields({"a": 1, "b": {1: 2}}, {"a": int, "c?": str}, "f", "Do.")
    check_fields({"c": None}, {"c?": str}, "f", "Do.")
    check_fields({"x": 1.5, "y": 3}, {"*": float}, "f", "Do.")
    for wrong in ({"a": None}, {"a": True}, {"a": 1.0}, {}, [], None):
        with pytest.raises(UserError, match=r"^f: .* Do\.$"):
            check_fields(wrong, {"a": int}, "f", "Do.")
    for wrong in (float("nan"), float("inf"), 10**400, "1"):
        with pytest.raises(UserError, match="x must be a number"):
            check_fields({"x": wrong}, {"*": float}, "f", "Do.")


def test_a_yaml_of_timm_is_read_as_it_was_written(tmp_path):
    shared = [0.5, 0.5]
    content = {"a": shared, "b": shared, "c": None, "d": {"e": 1e-3}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    assert "*id001" in (tmp_path / "a.yaml").read_text()
    assert load_yaml(tmp_path / "a.yaml") == content
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load_json(tmp_path / "a.json") == content
    assert os.listdir(tmp_path)
