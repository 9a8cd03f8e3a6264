"""Found by timm without an import, and never in anyone's way."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
KNOWN = "import timm; print(timm.is_model('resnet50_ema'))"
OFF = {"EMA_TIMM_AUTOLOAD": "0"}
TORCH_OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def copy_installation(folder):
    """The package as `pip install --target` lays it down, to be damaged; shadows the real one."""
    shutil.copytree(
        ROOT / "ema_timm", folder / "ema_timm", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "ema_timm_autoload.py", folder)
    info = folder / "ema_timm-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ema-timm\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nema_timm = ema_timm_autoload:autoload\n"
    )
    return {"PYTHONPATH": str(folder)}


# Counts our warnings while torch and timm are imported, then uses both.
COUNT = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
    import timm
    import timm.models
ours = [str(w.message) for w in seen if "ema-timm" in str(w.message)]
assert timm.create_model("resnet18", device="meta")(torch.ones(1, 3, 64, 64, device="meta")).shape
print(len(ours), ours[0] if ours else "", timm.is_model("resnet18_ema"), sep="|")
"""


def test_names_are_there_in_a_process_that_never_names_us(python):
    out = python("import timm; print(type(timm.create_model('resnet18_ema').layer1[0].se))")
    assert "ema_timm.attention.EmaAttn" in out


def test_names_are_there_in_isolated_mode(python):
    assert python(KNOWN, "-I") == "True\n"


def test_target_installation(python, tmp_path):
    env = copy_installation(tmp_path)
    out = python(
        "import timm, ema_timm; print(ema_timm.__file__, timm.is_model('resnet18_ema'))", env=env
    )
    assert out == f"{tmp_path}/ema_timm/__init__.py True\n"


def test_both_entry_point_groups_are_declared():
    for group in ("torch.backends", "timm.models"):
        (ours,) = [e for e in entry_points(group=group) if e.name == "ema_timm"]
        assert ours.value == "ema_timm_autoload:autoload"


@pytest.mark.parametrize(
    "env",
    [OFF, pytest.param(TORCH_OFF, marks=pytest.mark.slow)],
    ids=["ours off", "torch's off"],
)
@pytest.mark.parametrize(
    ("code", "known"),
    [
        (KNOWN, False),
        ("import ema_timm; " + KNOWN, True),
        ("import timm, ema_timm; print(timm.is_model('resnet50_ema'))", True),
        pytest.param("import torch, ema_timm; " + KNOWN, True, marks=pytest.mark.slow),
    ],
    ids=["no import", "before timm", "after timm", "after torch"],
)
def test_switched_off_an_import_is_enough(python, env, code, known):
    assert python(code, env=env) == f"{known}\n"


def test_importing_the_package_imports_neither_torch_nor_timm(python):
    out = python("import ema_timm, sys; print({'torch', 'timm', 'triton'} & set(sys.modules))")
    assert out == "set()\n"


def test_importing_torch_loads_one_module_of_ours_and_not_timm(python):
    code = "import torch, sys; print([m for m in sys.modules if m.startswith(('ema_', 'timm'))])"
    assert python(code) == "['ema_timm_autoload']\n"


def test_a_bare_interpreter_loads_nothing(python):
    code = "import sys; print([m for m in sys.modules if 'ema_timm_autoload' in m])"
    assert python(code) == "[]\n"


def test_timm_models_looks_untouched(python):
    """Loader, spec, source, resources and reload are as without us; nothing registers twice."""
    code = """
import importlib, importlib.resources, inspect, json, sys
import timm.models as m
before = (type(m.__loader__).__name__, type(m.__spec__.loader).__name__, m.__loader__ is
    m.__spec__.loader, m.__spec__.origin, m.__spec__.submodule_search_locations, m.__file__,
    len(inspect.getsource(m)), str(importlib.resources.files(m) / "resnet.py"),
    importlib.util.find_spec("timm.models") is m.__spec__)
assert importlib.reload(m) is m
after = (type(m.__loader__).__name__, type(m.__spec__.loader).__name__, len(inspect.getsource(m)))
print(json.dumps([before, after]))
"""
    with_us = python(code, "-W", "error::UserWarning")
    without = python(code, env=OFF)
    assert json.loads(with_us) == json.loads(without)


def test_nothing_registers_twice(python):
    code = """
import importlib, warnings, timm, ema_timm, ema_timm_autoload
count = len(timm.list_models("*_ema"))
importlib.reload(timm.models), importlib.reload(ema_timm)
ema_timm_autoload.install(), ema_timm_autoload.autoload()
assert len(timm.list_models("*_ema")) == count > 50
import sys
assert sum(type(f).__name__ == "_TimmModelsFinder" for f in sys.meta_path) == 1
from timm.models import resnet
from ema_timm.backbones import resnet_ema
assert len(resnet_ema.__all__) == len(set(resnet_ema.__all__))
"""
    python(code, "-W", "error::UserWarning", "-W", "error::RuntimeWarning")


def test_looking_for_timm_models_has_no_effect(python):
    code = """
import importlib.util, sys, torch
path = importlib.util.find_spec("timm").submodule_search_locations
for finder in sys.meta_path:
    spec = finder.find_spec("timm.models", path)
    if spec:
        break
assert spec.origin.endswith("__init__.py") and spec.loader.get_source("timm.models")
assert not {"timm", "timm.models", "ema_timm"} & set(sys.modules)
import timm
print(timm.is_model("resnet18_ema"))
"""
    assert python(code) == "True\n"


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, OFF], ids=["autoload", "by import"])
def test_six_threads_at_once(python, env):
    code = """
import sys, threading
sys.setswitchinterval(1e-5)
start, found, errors = threading.Barrier(6), [], []
def work(number):
    start.wait()
    try:
        if number % 2:
            import ema_timm
        import timm
        if not number % 2:
            import ema_timm
        found.append(timm.is_model("resnet18_ema"))
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
[t.start() for t in threads]; [t.join(120) for t in threads]
assert not errors, errors
assert not any(t.is_alive() for t in threads), "deadlock"
print(found == [True] * 6)
"""
    assert python("import torch\n" + code, "-W", "error::UserWarning", env=env) == "True\n"


def test_without_timm_nothing_happens(python):
    code = """
import sys, warnings
class NoTimm:
    def find_spec(self, name, path=None, target=None):
        if name == "timm" or name.startswith("timm."):
            raise ModuleNotFoundError("No module named 'timm'", name=name)
sys.meta_path.insert(0, NoTimm())
warnings.simplefilter("error")
import torch, ema_timm
layer = ema_timm.EmaAttn(32)
print(layer(torch.ones(1, 32, 2, 2)).shape)
try:
    import timm
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code) == "torch.Size([1, 32, 2, 2])\ntimm\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "models",
    ["", "from timm_gone import nothing_we_need", None],
    ids=["lacks what we use", "fails itself", "too old"],
)
def test_a_timm_we_cannot_use_imports_as_before(python, tmp_path, models):
    timm = tmp_path / "timm"
    if models is None:
        real = Path(sys.modules["timm"].__file__).parent if "timm" in sys.modules else None
        real = real or Path(__import__("timm").__file__).parent
        shutil.copytree(real, timm, ignore=shutil.ignore_patterns("__pycache__"))
        (timm / "version.py").write_text("__version__ = '1.0.23'\n")
    else:
        (timm / "models").mkdir(parents=True)
        (timm / "__init__.py").write_text("__version__ = '9.0'\nfrom . import models\n")
        (timm / "models" / "__init__.py").write_text(models)
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
    try:
        import timm
        print(timm.__version__)
    except ModuleNotFoundError as error:
        print(error.name)
    import ema_timm
ours = [str(w.message) for w in seen if "ema-timm" in str(w.message)]
print(len(ours), *ours)
"""
    first, second = python(code, env={"PYTHONPATH": str(tmp_path)}).splitlines()
    if models:
        assert (first, second) == ("timm_gone", "0")  # timm's own error, and no word of ours
    elif models == "":
        assert first == "9.0"
        assert second.startswith("1 ema-timm could not register its models (ImportError")
    else:
        assert first == "1.0.23"
        assert "needs timm >= 1.0.24, found 1.0.23: pip install -U" in second
        assert "reinstall" not in second  # one remedy


@pytest.mark.parametrize(
    ("version", "models"),
    [("1.0.23", "def get_arch_pretrained_cfgs(): ..."), ("0.9.16", "")],
    ids=["a little", "lacks what we use"],
)
def test_a_timm_that_is_too_old_is_told_one_remedy(python, tmp_path, version, models):
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "models" / "__init__.py").write_text(models)
    (tmp_path / "timm" / "__init__.py").write_text(
        f"__version__ = {version!r}\nfrom . import models\n"
    )
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, timm
print(*[str(w.message) for w in seen if "ema-timm" in str(w.message)], sep="|")
"""
    (said,) = python(code, env={"PYTHONPATH": str(tmp_path)}).strip().split("|")
    assert f"found {version}: pip install -U 'timm>=1.0.24')" in said
    assert said.count("pip ") == 1 and "reinstall" not in said


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "ema_timm/backbones/__init__.py").write_text("def register(:"),
        *(
            pytest.param(damage, marks=pytest.mark.slow)
            for damage in (
                lambda p: (p / "ema_timm/attention.py").write_text(""),
                lambda p: (p / "ema_timm/__init__.py").write_text("raise SystemError('damaged')"),
                lambda p: (p / "ema_timm/ops/dispatch.py").write_bytes(b"\0\0\0"),
            )
        ),
    ],
    ids=["syntax error", "emptied file", "raises", "zeroed file"],
)
def test_a_damaged_installation_gives_one_warning(python, tmp_path, damage):
    env = copy_installation(tmp_path)
    damage(tmp_path)
    count, text, known = python(COUNT, env=env).strip().split("|")
    assert (count, known) == ("1", "False")
    assert "pip install --force-reinstall" in text


GONE = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "ema_timm" or name.startswith("ema_timm."):
            raise ModuleNotFoundError("No module named 'ema_timm'", name=name)
sys.meta_path.insert(0, Gone())
"""


def test_a_package_folder_that_is_gone_gives_one_warning(python):
    count, text, known = python(GONE + COUNT).strip().split("|")
    assert (count, known) == ("1", "False")
    assert "No module named 'ema_timm'" in text


def test_warnings_as_errors_do_not_break_the_import(python):
    python(
        GONE + "import torch, timm\nassert timm.is_model('resnet18')", "-W", "error::RuntimeWarning"
    )


def test_a_name_that_timm_takes_stays_timms(python):
    code = """
import warnings, torch, timm.models
from timm.models import register_model
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    def resnet18_ema(pretrained=False, **kwargs):
        return torch.nn.Identity()
    register_model(resnet18_ema)
    import ema_timm
print(type(timm.create_model("resnet18_ema")).__name__, timm.is_model("resnet50_ema"))
print([str(w.message) for w in seen])
"""
    first, second = python(code, env=OFF).splitlines()
    assert first == "Identity True"
    assert "timm has its own model resnet18_ema" in second


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_child_processes(tmp_path, method):
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing as mp\n"
        "def child(queue):\n"
        "    import timm\n"
        "    queue.put(timm.is_model('resnet18_ema'))\n"
        "if __name__ == '__main__':\n"
        f"    context = mp.get_context({method!r})\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=child, args=(queue,))\n"
        "    process.start(); print(queue.get(timeout=120)); process.join()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_data_loader_workers(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import torch\n"
        "class Names(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i):\n"
        "        import timm\n"
        "        return int(timm.is_model('resnet18_ema'))\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(\n"
        "        Names(), num_workers=1, multiprocessing_context='spawn')\n"
        "    print([int(x) for x in loader])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[1, 1]\n", done.stderr


@pytest.mark.slow
def test_torchrun(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, pathlib, timm\n"
        "out = pathlib.Path(__file__).with_name(os.environ['RANK'])\n"
        "out.write_text(str(timm.is_model('resnet18_ema')))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


def test_a_pickled_model_loads_where_only_torch_was_imported(python, tmp_path):
    import timm

    model = timm.create_model("test_resnet_ema").eval()
    x = torch.randn(1, 3, 64, 64)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = """
import sys, torch
model, x, want = torch.load(sys.argv[1], weights_only=False)
print(torch.equal(model(x), want))
"""
    assert python(code, args=[tmp_path / "model.pt"]) == "True\n"


def test_entry_points_pickle_by_reference():
    import pickle

    import timm

    entry = timm.model_entrypoint("resnet18_ema")
    assert pickle.loads(pickle.dumps(entry)) is entry
    assert "ema_stages" in entry.__doc__
