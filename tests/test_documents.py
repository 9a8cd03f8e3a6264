"""The README and the guides are true: every block that a reader would copy runs as it stands."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from safetensors.torch import save
from support.stand_in_hub import StandInHub
from timm.models import get_pretrained_cfg

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.training.quickstart import write_digits
from ema_timm.training.settings import FinetuneConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PASTED = ROOT / "ema_timm" / "integrations" / "pasted.md"  # test_pasted_guide.py runs it
DOCUMENTS = [README, CONTRIBUTING, PASTED, *sorted((ROOT / "ema_timm").rglob("README.md"))]
LINKING = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / ".github" / "SECURITY.md"]
REPOSITORY = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["repository-code"]
# How a document links to a file of the repository from outside of it.
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
OWN_LINK = re.compile(rf"(?:{REPOSITORY}/blob|{RAW})/main/(.+)")

# Blocks that are run elsewhere, or that nothing here can run; by a part of their text.
ELSEWHERE = {
    "ema-timm quickstart": "training/test_quickstart.py, and in a fresh environment CI",
    "-m pytest": "this is the test run",
    "train.py": "with_timm/test_timm_scripts.py, where TIMM_REPO is set",
    "pip install": "nothing is installed while tests run; CI installs the extras",
    "torchrun": "training/test_finetune.py and test_machines.py, on two processes",
    "ema-timm bench": "bench/test_bench.py; its times want a quiet machine",
    "ema-timm tune": "tuning/test_tune.py; its times want a GPU",
    "ema_timm.tune(": "tuning/test_tune.py; its times want a GPU",
    "test_hub_faults.py": "publishing/test_hub_faults.py itself",
    "pytest -m gpu": "needs a GPU",
    "digits-5000": "the comparison that was made; training/compare/test_compare.py has a small one",
    "ema-timm yolo best.pt": "integrations/test_yolo_publish.py; the detector is the reader's",
    'YOLO("best-ema.pt")': "integrations/test_yolo_blocks.py; the detector is the reader's",
    'load("USER/detector")': "integrations/test_yolo_publish.py, from the stand-in Hub",
    "torch_pruning": "integrations/test_pruning.py, where torch-pruning is installed",
    "XnnpackPartitioner": "integrations/test_executorch.py, where executorch is installed",
    "--format ncnn": "export/test_ncnn.py, where ncnn is installed",
    "import ncnn": "export/test_ncnn.py, where ncnn is installed",
    "nncf.quantize": "integrations/test_nncf.py, where NNCF is installed",
    'YOLO("yolo11n.pt")': "integrations/test_yolo_inject.py; these weights are downloaded",
}
# Commands run as they stand; only the work that they give the machine is cut down: smaller images
# and batches, and a twentieth of the epochs.
LESS_WORK = {
    "finetune": "--batch-size 12 --img-size 32 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
    "compare": "--attention none ema --seeds 1 --epochs 1 --batch-size 12 --img-size 32 "
    "--workers 0 --devices cpu",
}
EPOCHS_AS_ONE = FinetuneConfig.epochs
FEWER_STEPS = "epochs=1, batch_size=12, img_size=32, device='cpu', workers=0"
SHIM = f"""#!{sys.executable}
import os, sys
args = sys.argv[1:]
if args[0] == "finetune":
    if "--epochs" in args:
        at = args.index("--epochs") + 1
        args[at] = str(-(-int(args[at]) // {EPOCHS_AS_ONE}))
    elif "--resume" not in args or "--model" in args:
        args += ["--epochs", "1"]
less = {LESS_WORK}.get(args[0], "").split()
for flag in (word for word in less if word.startswith("--") and word in args):
    start = end = args.index(flag)  # a repeated option would keep all its values
    while end == start or (end < len(args) and not args[end].startswith("--")):
        end += 1
    del args[start:end]
args += less
os.execv(sys.executable, [sys.executable, "-m", "ema_timm", *args])
"""
PRELUDE = (
    "import timm, torch\n"
    "model, images = timm.create_model('resnet18_ema'), torch.randn(1, 3, 64, 64)\n"
)


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document):
    text = document.read_text("utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(document, line, found[1], found[2])


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
CODE = [block for block in BLOCKS if block.language in ("bash", "python", "sh", "console")]


def elsewhere(block):
    return [part for part in ELSEWHERE if part in block.text]


def test_the_documents_are_found_and_no_exception_is_stale():
    assert len(DOCUMENTS) > 10
    assert len(CODE) > 20
    unused = [part for part in ELSEWHERE if not any(part in block.text for block in CODE)]
    assert not unused
    assert {block.language for block in BLOCKS} <= {"bash", "python", "bibtex", "text", "yaml"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, digits, trained, hub_env):
    """Where a reader sits: images, a trained folder, checkpoints of other code, a Hub."""
    place = tmp_path_factory.mktemp("desk")
    shutil.copytree(digits, place / "flowers")
    shutil.copytree(trained, place / "runs" / "flowers")
    torch.save(
        {"arch": "mobilenetv2_100_ema", "state_dict": _state("mobilenetv2_100_ema", 4)},
        place / "model_best.pth.tar",
    )
    timms = place / "output" / "train" / "NAME"
    timms.mkdir(parents=True)
    torch.save(
        {"arch": "test_resnet_ema", "epoch": 1, "state_dict": _state("test_resnet_ema", 4)},
        timms / "model_best.pth.tar",
    )
    write_digits(place / "runs" / "quickstart" / "digits")
    shutil.copytree(trained, place / "runs" / "quickstart" / "run")
    (place / "bin").mkdir()
    for name, text in {
        "ema-timm": SHIM,
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    with StandInHub() as hub:
        for name in ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0"):
            cfg = get_pretrained_cfg(name)
            files = {"model.safetensors": save(_state(name, cfg.num_classes))}
            hub.store.put(cfg.hf_hub_id.rstrip("/"), files, "Publish")
        env = {
            **os.environ,
            **hub_env(hub),
            "CI": "true",  # OpenVINO sends no telemetry then
            "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        files = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}
        hub.store.put("ada/flowers", files, "Publish")
        yield place, env


def _state(name, num_classes):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d != PASTED], ids=lambda d: str(d.relative_to(ROOT))
)
def test_blocks_run_in_the_order_in_which_they_stand(document, desk, tmp_path):
    """One after another in one folder, so that a block may build on those above it."""
    place, env = desk
    here = shutil.copytree(place, tmp_path / "desk", symlinks=True)
    for block in [b for b in CODE if b.document == document and not elsewhere(b)]:
        text = block.text.replace("USER/", "ada/").replace("workers=0", FEWER_STEPS)
        if "ema-timm finetune" in text and "--resume" not in text:
            for output in re.findall(r"--output (\S+)", text):
                shutil.rmtree(here / output, ignore_errors=True)
        if block.language == "python":
            command = [sys.executable, "-c", PRELUDE + text]
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=here, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{block}\n{text}\n{done.stdout}\n{done.stderr}"


def links(document):
    """The targets of a document's links and images, without anchors in the document itself."""
    return re.findall(r"\]\(([^)#\s]+)", document.read_text("utf-8"))


@pytest.mark.parametrize("document", LINKING, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(document):
    for link in links(document):
        own = OWN_LINK.fullmatch(link)
        if own or not link.startswith(("http:", "https:", "mailto:")):
            path = ROOT / own[1] if own else document.parent / link
            assert path.exists(), link


def test_the_readme_can_be_read_outside_of_the_repository():
    """The package index shows it, and knows no files beside it."""
    assert all(link.startswith("https://") for link in links(README))
    assert f'Repository = "{REPOSITORY}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_ruff_has_one_version():
    """Another one formats differently."""
    files = [ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml"]
    versions = [v for file in files for v in re.findall(r"ruff==([\d.]+)", file.read_text("utf-8"))]
    assert len(versions) == 3 and len(set(versions)) == 1


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 180


def test_the_readme_gives_the_sizes_of_the_networks_that_it_recommends():
    row = r"\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) G at (\d+) px \|"
    rows = re.findall(row, README.read_text("utf-8"))
    assert len(rows) == 3
    for name, parameters, macs, size in rows:
        model = timm.create_model(name, device="meta")
        assert f"{count_parameters(model) / 1e6:.1f}" == parameters
        assert f"{count_macs(model, (3, int(size), int(size)))['total'] / 1e9:.2f}" == macs


def test_the_readme_says_how_long_its_training_takes():
    measured = json.loads((ROOT / "ema_timm/bench/results/model-cpu.json").read_text("utf-8"))
    (row,) = [row for row in measured["rows"] if row["network"] == "resnet50_ema"]
    minutes = 1000 * FinetuneConfig.epochs / row["training_images_per_s"] / 60
    text = " ".join(README.read_text("utf-8").split())
    assert f"1,000 training images take about {round(minutes, -1):.0f} minutes" in text
    assert (
        f"trains {FinetuneConfig.epochs} epochs with batches of {FinetuneConfig.batch_size}" in text
    )


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=str)
def test_python_names_can_be_imported_as_they_are_written(document):
    """But for those that a changelog has under "Removed" or "Moved"."""
    text = re.sub(
        r"^### (Removed|Moved)\n.*?(?=^##|\Z)", "", document.read_text("utf-8"), flags=re.M | re.S
    )
    names = set(re.findall(r"(?<![\w/.-])ema_timm(?:\.[A-Za-z]\w*)+(?![\w/])", text))
    for module, imported in re.findall(r"from (ema_timm[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.split()[0]}" for name in imported.split(",")}
    for name in names:
        if not name.endswith(".py"):
            resolve_name(name)


def environment_variables():
    """Variables that the package, its installation and its tests read."""
    files = [ROOT / "setup.py", ROOT / "ema_timm_autoload.py"]
    files += [*(ROOT / "ema_timm").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for file in files:
        own = not file.is_relative_to(ROOT / "tests")
        for name in variables_read(ast.parse(file.read_text("utf-8"))):
            if own or re.match("EMA_TIMM_|TIMM_", name):
                yield name


def variables_read(tree):
    """Names in ``os.environ["NAME"]``, ``"NAME" in os.environ``, ``os.getenv("NAME")``, ..."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            place, names = node.value, [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = node.func
            place, names = call if call.attr == "getenv" else call.value, node.args[:1]
        elif isinstance(node, ast.Compare):
            place, names = node.comparators[0], [node.left]
        if names and re.search(r"\b(environ|getenv)$", ast.unparse(place)):
            yield from (name.value for name in names if isinstance(name, ast.Constant))


def test_the_table_of_environment_variables_is_complete():
    text = (ROOT / "ema_timm" / "cli" / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| `([A-Z_]+)` \|", text, re.M)
    assert sorted(listed) == sorted(set(environment_variables()))
