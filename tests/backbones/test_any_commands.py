"""Every command takes `ema_any`: train, resume, measure, classify, look, publish, transformers."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.networks import shake
from support.runs import run

from ema_timm import placement
from ema_timm.checkpoints.cards.file import write_card
from ema_timm.checkpoints.check import check_publishable
from ema_timm.checkpoints.network import open_network, rebuild
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.cli import main
from ema_timm.compare.variants import describe_start, read_variants
from ema_timm.errors import UserError
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.settings import FinetuneConfig

NETWORK = {"base": "test_convnext2", "at": "stages", "groups": 4}


@pytest.fixture(scope="module")
def ran(digits, tmp_path_factory):
    """A run of one epoch from the weights of the base."""
    root = tmp_path_factory.mktemp("any")
    plain = shake(timm.create_model("test_convnext2"))
    save_file(plain.state_dict(), root / "plain.safetensors")
    config = FinetuneConfig(
        model="ema_any",
        model_kwargs=NETWORK,
        weights=str(root / "plain.safetensors"),
        data_dir=str(digits),
        output=str(root / "run"),
        epochs=1,
        batch_size=12,
        img_size=32,
        workers=0,
        device="cpu",
    )
    return root / "run", run(config)


def test_finetune_writes_a_folder_that_timm_loads(ran):
    folder, results = ran
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architecture"] == results["architecture"] == "ema_any"
    assert saved["model_args"]["base"] == "test_convnext2"
    assert results["base"]["model"] == "test_convnext2"
    assert results["macs"]["ema"] > 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert len(placement(model)["at"]) == 4


def test_evaluate_predict_attend_and_card(ran, digits, tmp_path, capsys):
    folder, image = str(ran[0]), str(next((digits / "val").rglob("*.png")))
    data = ["--data-dir", str(digits), "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", folder, *data]) == 0
    assert main(["predict", folder, image]) == 0
    pytest.importorskip("pytorch_grad_cam")
    assert main(["attend", folder, image, "--output", str(tmp_path / "attend.png")]) == 0
    assert "stages" in capsys.readouterr().err
    write_card(folder, {"license": "mit"}, True)
    checked = check_publishable(folder)
    assert "configuration_ema_timm.py" in checked.files
    assert "ema-attention" in checked.card
    assert "pip install ema-timm" in checked.card


def test_transformers_loads_the_folder(ran):
    transformers = pytest.importorskip("transformers")
    folder, _ = ran
    images = torch.randn(2, 3, 32, 32)
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, ours(images))


def test_a_checkpoint_file_of_timms_script_is_rebuilt(ran, tmp_path):
    model, _ = open_network(ran[0])
    (tmp_path / "args.yaml").write_text(json.dumps({"model": "ema_any", "model_kwargs": NETWORK}))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    rebuilt = rebuild(read_checkpoint(tmp_path / "last.pth.tar"))
    assert rebuilt.model_args["base"] == "test_convnext2"
    assert placement(rebuilt.network) == placement(model)


def test_the_weights_of_the_base_are_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ema_timm.training.initial_weights.fetch", lambda repo, *_: asked.append(repo)
    )
    initial = InitialModel("ema_any", {"base": "convnext_tiny.fb_in1k"})
    assert initial.loads_weights
    initial.config_overlay(torch.nn.Identity())
    assert asked == ["timm/convnext_tiny.fb_in1k"]
    assert not InitialModel("ema_any", {"base": "mobilenetv2_035"}).loads_weights


def test_a_comparison_takes_other_families():
    none, ema, ablation = read_variants(
        ["none", "ema@groups=8,at=se", "ema-no-cross-spatial"], "test_efficientnet"
    )
    assert none.model == "test_efficientnet"
    assert ema.model == "ema_any"
    assert ema.model_kwargs == {"base": "test_efficientnet", "at": "se", "groups": 8}
    assert ablation.model_kwargs["cross_spatial"] is False
    for variant in (ema, ablation):
        said = describe_start(variant, variant.model_kwargs, "timm/test_efficientnet.r160_in1k")
        assert said == "plain weights, layer with identity initialisation"
    for names, said in (
        (["se"], "can be compared with none, ema"),
        (["ema@stages=3"], "at, groups"),
    ):
        with pytest.raises(UserError, match=said):
            read_variants(names, "test_efficientnet")
