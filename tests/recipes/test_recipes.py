"""The recipes: YAML that timm's train.py reads, true to the paper and to timm's options."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from support.networks import shake
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.integrations.yolo import paper
from ema_timm.recipes import read, recipes

REPO = os.environ.get("TIMM_REPO")
needs_timm_repo = pytest.mark.skipif(not REPO, reason="set TIMM_REPO to a clone of timm")
NAMES = sorted(recipes())
TIMM_OPTIONS = json.loads(
    (Path(__file__).parents[1] / "with_timm" / "timm_train_options.json").read_text()
)


def mistakes(config: dict, options: dict) -> list[str]:
    """What train.py would ignore or choke on; a config file's keys reach it unchecked."""
    found = []
    for key, value in config.items():
        if key not in options:
            found.append(f"{key} is no option of train.py")
            continue
        kind, nargs, choices = (options[key][name] for name in ("type", "nargs", "choices"))
        values = value if nargs == "+" or isinstance(nargs, int) else [value]
        types = {
            "flag": lambda v: v is True,
            "mapping": lambda v: isinstance(v, dict),
            "str": lambda v: isinstance(v, str),
            "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
            "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        }
        if not isinstance(values, list) or not all(types[kind](v) for v in values):
            found.append(f"{key} takes {kind} (nargs {nargs}), got {value!r}")
        elif choices and value not in choices:
            found.append(f"{key} takes one of {choices}, got {value!r}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_timm_knows_every_key_and_takes_every_value(name):
    assert mistakes(yaml.safe_load(read(name)), TIMM_OPTIONS["options"]) == []


@pytest.mark.parametrize(
    "config",
    [
        {"learning_rate": 0.1},
        {"weight-decay": 0.1},
        {"lr": "5e-4"},  # YAML 1.1 reads 5e-4 as a word
        {"epochs": 2.5},
        {"decay_milestones": 60},
        {"model_kwargs": "ema_groups=8"},
        {"amp": "yes"},
        {"mixup_mode": 1},
    ],
)
def test_a_typo_would_be_seen(config):
    assert mistakes(config, TIMM_OPTIONS["options"])


def test_the_paper_experiments_are_all_there():
    assert NAMES == [
        "cifar100_resnet101",
        "cifar100_resnet101_ema",
        "cifar100_resnet50",
        "cifar100_resnet50_ema",
        "cifar100_resnet50_ema_groups",
        "cifar100_resnet50_ema_no_cross_spatial",
        "finetune_warm_start",
        "imagenet_mobilenetv2_ema_200",
        "imagenet_mobilenetv2_ema_400",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_was_reported_and_what_was_not_measured(name):
    said = " ".join(read(name).replace("\n#", " ").split())
    assert "The paper reports" in said
    assert re.search("[Tt]his project has not measured it", said)


@pytest.mark.parametrize("name", NAMES)
def test_network_and_its_parameters_are_as_described(name):
    config = yaml.safe_load(read(name))
    model = build(config)
    count = sum(p.numel() for p in model.parameters())
    for said in re.findall(r"here ([\d,]+)\)", read(name)):
        assert int(said.replace(",", "")) == count
    layers = [m for m in model.modules() if type(m).__name__ == "EmaAttn"]
    assert bool(layers) == ("ema" in config["model"])
    if name.endswith("groups"):
        assert {m.groups for m in layers} == {16}
    assert all(m.cross_spatial != name.endswith("no_cross_spatial") for m in layers)


def build(config):
    return timm.create_model(
        config["model"],
        num_classes=config.get("num_classes"),
        drop_rate=config.get("drop", 0.0),
        drop_path_rate=config.get("drop_path"),
        device="meta",
        **config.get("model_kwargs", {}),
    )


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # timm counts from 0 and decays for the 60th epoch, number 59.
        ("cifar100_resnet50_ema", {0: 0.1, 58: 0.1, 59: 0.02, 119: 0.004, 159: 8e-4, 199: 8e-4}),
        ("imagenet_mobilenetv2_ema_400", {0: 1e-5, 5: 0.4, 200: 0.2, 399: 0.0}),
        ("imagenet_mobilenetv2_ema_200", {0: 0.05, 100: 0.025, 199: 0.0}),
        ("finetune_warm_start", {0: 1e-6, 15: 2.5e-4, 29: 1e-6}),
    ],
)
def test_learning_rate_follows_the_described_schedule(name, rates):
    config = Namespace(**{**DEFAULTS, **yaml.safe_load(read(name))})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    per_epoch = 10
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(config), updates_per_epoch=per_epoch
    )
    assert epochs == config.epochs
    for epoch, wanted in rates.items():
        scheduler.step(epoch)
        scheduler.step_update(epoch * per_epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=0.02, abs=1e-5)


# train.py's own defaults of what the scheduler reads.
DEFAULTS = {
    "sched_on_updates": False,
    "warmup_lr": 1e-5,
    "min_lr": 0.0,
    "cooldown_epochs": 0,
    "patience_epochs": 10,
    "decay_rate": 0.1,
    "momentum": 0.9,
}


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_and_augmentation_exist(name):
    config = yaml.safe_load(read(name))
    arguments = Namespace(**{**DEFAULTS, **config})
    model = build(config)
    optimizer = create_optimizer_v2(
        model, **optimizer_kwargs(cfg=arguments), **config.get("opt_kwargs", {})
    )
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    kept = config.get("opt_kwargs", {}).get("filter_bias_and_bn", True)
    assert decays == ({0.0, config["weight_decay"]} if kept else {config["weight_decay"]})
    if config["opt"] == "momentum":
        assert not optimizer.defaults["nesterov"]
    data = resolve_data_config({"img_size": config["img_size"]}, model=model)
    transform = create_transform(
        **{k: data[k] for k in ("input_size", "mean", "std")},
        is_training=True,
        scale=config.get("scale"),
        ratio=config.get("ratio"),
        color_jitter=config.get("color_jitter", 0.4),
        auto_augment=config.get("aa"),
    )
    image = Image.effect_noise((40, 36), 90).convert("RGB")
    assert transform(image).shape == (3, config["img_size"], config["img_size"])


def test_list_and_print(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*NAMES, *paper.recipes()]
    assert all(len(line.split()) > 3 for line in listed)
    assert main(["recipes", "cifar100_resnet50_ema"]) == 0
    assert capsys.readouterr().out == read("cifar100_resnet50_ema")


@pytest.mark.parametrize("name", ["cifar100_resnet50_em", "../pyproject", "", "x.yaml"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UserError, match=r"no recipe is named .*ema-timm recipes lists them"):
        read(name)


def test_needs_neither_torch_nor_timm(python):
    code = (
        "import sys\nfrom ema_timm.cli import main\nassert main(['recipes']) == 0\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    assert python(code).splitlines()[-1] == "set()"


# timm's own train.py.


@pytest.fixture
def folder(tmp_path):
    """train.py beside 4 images to train on and 2 to validate: two steps of 2."""
    shutil.copy(Path(REPO) / "train.py", tmp_path)
    for split, count in (("train", 2), ("validation", 1)):
        for label in ("a", "b"):
            for index in range(count):
                path = tmp_path / "images" / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40, 40), 60 + index).convert("RGB").save(path)
    return tmp_path


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_timm_repo
@pytest.mark.parametrize("name", NAMES)
def test_trains_two_steps_with_timms_script(name, folder):
    config = yaml.safe_load(read(name))
    (folder / "recipe.yaml").write_text(read(name))
    command = ["train.py", "-c", "recipe.yaml", "--data-dir", "images", "--dataset", ""]
    command += ["--device", "cpu", "-j", 0, "-b", 2, "--num-classes", 4, "--epochs", 1]
    command += ["--log-interval", 1, "--output", "out", "--experiment", "e"]
    command += ["--img-size", min(config["img_size"], 64)]
    if config.get("pretrained"):
        plain = shake(timm.create_model(config["model"].removesuffix("_ema")))
        torch.save(plain.state_dict(), folder / "plain.pt")
        command += ["--pretrained-path", "plain.pt"]
    said = run(folder, *command)
    assert re.findall(r"Train: 0 \[ *(\d)/2", said) == ["0", "1"]
    written = yaml.safe_load((folder / "out" / "e" / "args.yaml").read_text())
    given = {key for key in config if f"--{key.replace('_', '-')}" not in command}
    assert {key: written[key] for key in given - {"batch_size"}} == {
        key: config[key] for key in given - {"batch_size"}
    }
    state = torch.load(folder / "out" / "e" / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@needs_timm_repo
def test_the_listed_options_are_those_of_timms_parser(folder):
    code = """
import json, sys
sys.argv = ["train.py"]
import train
names = {None: "str", int: "int", float: "float", str: "str"}
found = {}
for a in train.parser._actions:
    kind = "mapping" if type(a).__name__ == "ParseKwargs" else "flag" if a.nargs == 0 else None
    choices = list(a.choices) if a.choices else None
    flag = kind == "flag"
    found[a.dest] = {
        "type": kind or names[a.type], "nargs": None if flag else a.nargs, "choices": choices
    }
print(json.dumps(found))
"""
    real = json.loads(run(folder, "-c", code).splitlines()[-1])
    used = {key for name in NAMES for key in yaml.safe_load(read(name))}
    listed = TIMM_OPTIONS["options"]
    assert {key: real[key] for key in used} == {key: listed[key] for key in used}
