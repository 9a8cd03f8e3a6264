"""Whatever of the package is imported first, timm knows all the names afterwards."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ema_timm

PACKAGE = Path(ema_timm.__file__).parent
MODULES = sorted(
    ".".join(("ema_timm", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    # What runs when it is imported, and what is only ever copied into a checkpoint.
    if path.name != "__main__.py" and path.parent.name != "stub"
)
# What registering the names imports, and what stands directly over it.
NEAR = (
    "ema_timm.backbones",
    "ema_timm.attention",
    "ema_timm.ops.dispatch",
    "ema_timm.integrations",
)
STATEMENTS = [
    *(f"from ema_timm import {name}" for name in ema_timm.__all__),
    *(
        pytest.param(
            f"import {name.removesuffix('.__init__')}",
            marks=() if name.startswith(NEAR) else pytest.mark.long,
        )
        for name in MODULES
    ),
]

# Each statement in a process of its own. They are forked from one that has imported what timm
# imports, which takes longer than all the rest; timm and this package are not among that.
SERVER = """
import json, os, sys, warnings
import torch, torchvision, huggingface_hub, safetensors.torch
assert not [name for name in sys.modules if name.partition(".")[0] in ("timm", "ema_timm")]

def outcome(statement):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(statement, {})
        import timm
        names = timm.list_models("*_ema")
    return {"names": names, "warnings": [str(w.message) for w in seen if "ema" in str(w.message)]}

for statement in sys.stdin:
    child = os.fork()
    if not child:
        try:
            answer = outcome(statement)
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


PACKAGES = [name for name in MODULES if name.endswith(".__init__")]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_no_modules_and_can_be_imported(name):
    """A module of that name would take the function's place once it is imported."""
    package = importlib.import_module(name.removesuffix(".__init__"))
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    public = getattr(package, "__all__", ())
    assert not modules & set(public)
    assert all(hasattr(package, each) for each in public)


@pytest.mark.parametrize("package", ["data", "measure", "see", "publishing", "integrations.yolo"])
def test_a_package_lists_its_public_names_without_torch(python, package):
    code = f"import sys, ema_timm.{package} as p; assert {{*p.__all__}} <= {{*dir(p)}}"
    python(f"{code}; assert p.__all__ and 'torch' not in sys.modules")


@pytest.fixture(scope="module")
def first():
    """``first(statement)``: the names and our warnings where it comes before all else."""
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": os.sep}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes) as server:

        def ask(statement):
            server.stdin.write(statement + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


@pytest.fixture(scope="module")
def names(python):
    return json.loads(python("import json, timm; print(json.dumps(timm.list_models('*_ema')))"))


@pytest.mark.parametrize("statement", STATEMENTS)
def test_every_module_and_public_name_may_come_first(first, names, statement):
    assert len(names) > 50
    assert first(statement) == {"names": names, "warnings": []}


@pytest.mark.parametrize(
    "statement", ["from ema_timm import inject", "import ema_timm.backbones.warm_start"]
)
def test_before_torch_too(python, names, statement):
    code = f"{statement}\nimport json, timm; print(json.dumps(timm.list_models('*_ema')))"
    assert json.loads(python(code, "-W", "error::RuntimeWarning")) == names


def test_a_thread_inside_the_wing_and_one_inside_timm_both_get_through(python):
    """The one holds what registering needs, and waits for what the other holds."""
    code = """
import sys, threading, time, torchvision
inside, failed = threading.Event(), []

class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == "timm.layers":  # in the middle of timm
            inside.set()
            time.sleep(2)

def load(statement):
    try:
        exec(statement, {"inside": inside})
    except BaseException as error:
        failed.append((statement, repr(error)))

sys.meta_path.insert(0, Pause())
wing = "inside.wait(); from ema_timm.backbones.inject import inject"
threads = [threading.Thread(target=load, args=(s,)) for s in ("import timm", wing)]
[t.start() for t in threads], [t.join() for t in threads]
import timm
assert not failed, failed
print(len(timm.list_models("*_ema")))
"""
    assert int(python(code, "-W", "error::RuntimeWarning")) > 50


@pytest.mark.slow
def test_threads_that_import_either_side_meet_a_whole_package(python):
    """Half of them load timm, half the wing that registers: each waits for the other's locks."""
    code = """
import sys, threading, torchvision  # whose own modules threads must not import first
sys.setswitchinterval(1e-6)
failed = []

def load(statement):
    try:
        exec(statement, {})
    except BaseException as error:
        failed.append((statement, repr(error)))

statements = ["import timm", "from ema_timm.backbones.inject import inject"] * 3
threads = [threading.Thread(target=load, args=(s,)) for s in statements]
[t.start() for t in threads], [t.join() for t in threads]
import timm
assert not failed, failed
print(len(timm.list_models("*_ema")))
"""
    for _ in range(3):
        assert int(python(code, "-W", "error::RuntimeWarning")) > 50
