"""The guide "Coming from a pasted class": its blocks run as they stand.

Those that need other libraries run in integrations/test_friends.py and test_yolo_pasted.py.
"""

import sys

import pytest
import torch
from support import guide, pasted_class

from ema_timm import EmaAttn

ELSEWHERE = {
    "Lightning": "integrations/test_friends.py",
    "mmdetection, mmsegmentation, mmpretrain": "integrations/test_friends.py",
    "A trained best.pt": "integrations/test_yolo_pasted.py",
}
HERE = [heading for heading in guide.blocks() if heading not in ELSEWHERE]


@pytest.fixture(autouse=True)
def _desk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_layers", pasted_class)


def test_every_block_has_its_test():
    assert len(HERE) > 4
    assert set(ELSEWHERE) < set(guide.blocks())
    assert list(guide.blocks("bash")) == ["YOLO model YAMLs"]  # in test_yolo_pasted.py


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit announces its own end
@pytest.mark.parametrize("heading", HERE)
def test_blocks_run_as_they_stand(heading, capsys):
    names = guide.run(heading)
    layers = [m for m in names.values() if isinstance(m, torch.nn.Module)]
    assert any(isinstance(m, EmaAttn) for layer in layers for m in layer.modules())


def test_the_comparison_notices_another_class(monkeypatch):
    class Other(pasted_class.EMA):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr(pasted_class, "EMA", Other)
    with pytest.raises(AssertionError, match="not close"):
        guide.run("Compare your class first")


def test_torchvision_weights_still_load_and_may_be_frozen():
    import torchvision

    model = guide.run("torchvision")["model"]
    found = model.state_dict()
    plain = torchvision.models.resnet18().state_dict()
    assert all(found[name].shape == tensor.shape for name, tensor in plain.items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"layer3", "layer4", "fc"}
    assert not trained & plain.keys() - {"fc.weight", "fc.bias"}


def test_torchvision_weights_give_the_same_outputs_under_a_name_of_timm():
    names = guide.run("torchvision")
    plain, named = names["plain"].eval(), names["named"].eval()
    assert any(isinstance(module, EmaAttn) for module in named.modules())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(named(x), plain(x), rtol=1e-4, atol=1e-4)
