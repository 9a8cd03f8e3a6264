"""transformers, with and without the package: loads the folder, or says what to install."""

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config

from ema_timm.checkpoints.config import AUTO_MAP, STUB, completed, stub_text
from ema_timm.checkpoints.folder import CheckpointWriter

_LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
folder, package, *calls = sys.argv[1:]
if package == "absent":
    sys.modules["ema_timm"] = sys.modules["ema_timm_autoload"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
for trust in calls:
    options = {"trust_remote_code": True} if trust == "trust" else {}
    try:
        model = AutoModelForImageClassification.from_pretrained(folder, **options).eval()
    except (ImportError, RuntimeError) as error:  # the latter from older transformers
        print(type(error).__name__, error)
    else:
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        with torch.no_grad():
            print(model(torch.ones(1, *processor.data_config["input_size"])).logits.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = CheckpointWriter(tmp_path_factory.mktemp("hub") / "run")
    folder.make()
    model = timm.create_model("test_resnet_ema", num_classes=3)
    data = {**resolve_data_config(model=model), "input_size": (3, 32, 32)}
    folder.save_model(model, {}, data, ["cat", "dog", "emu"], {"cat": "a small animal"})
    return folder.path


def load(python, folder, *args, **env):
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules"), **env}
    return python(_LOAD, args=(folder, *args), env=env)


def test_with_the_package_it_loads_also_where_the_plug_in_is_switched_off(python, folder):
    """Without the stub it loads too: see test_transformers_loads_the_folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.ones(1, 3, 32, 32)).tolist()
    off = {"EMA_TIMM_AUTOLOAD": "0"}
    loaded = json.loads(load(python, folder, "present", "trust", **off))
    # The values that a kernel rounds differ with where its memory lies.
    torch.testing.assert_close(torch.tensor(loaded), torch.tensor(logits))


def test_without_the_package_it_says_what_to_install(python, folder):
    absent = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    said = load(python, folder, "absent", "trust", "stock", **absent).strip().splitlines()
    assert "pip install ema-timm" in said[0]
    # What a reader sees without the stub, and cannot act on: upgrade timm, or an unknown model.
    assert len(said) > 1 and "ema-timm" not in " ".join(said[1:])


def test_labels_are_those_of_the_folder(folder):
    cfg = timm.create_model(f"local-dir:{folder}").pretrained_cfg
    assert cfg["label_names"] == ["cat", "dog", "emu"]
    assert cfg["label_descriptions"] == {"cat": "a small animal"}


def test_only_what_timm_does_not_know_is_given_a_stub(tmp_path):
    assert (completed({"architecture": "resnet18"})) == {"architecture": "resnet18"}
    for name in ("resnet18_ema", "cifar_resnet50", "ema_any"):
        assert completed({"architecture": name})["auto_map"] == AUTO_MAP
    folder = CheckpointWriter(tmp_path)
    folder.save_config({"architecture": "resnet18"})
    assert not (tmp_path / STUB).exists()


def test_the_stub_names_the_class_that_auto_map_does(folder):
    module, _, name = AUTO_MAP["AutoConfig"].partition(".")
    assert f"{module}.py" == STUB
    assert f"class {name}:" in stub_text()
    assert (folder / STUB).read_text() == stub_text()
