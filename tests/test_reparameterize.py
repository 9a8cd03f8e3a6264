"""timm's ``--reparam`` leaves EMA layers as they are; folded layers of 0.2.0 are refused."""

import pickle

import pytest
import timm
import torch
from timm.models.byobnet import RepVggBlock
from timm.utils import reparameterize_model
from torch import nn

from ema_timm.attention import EmaAttn

FOLDED = {
    "mix_weight": (6, 6),
    "mix_bias": (6,),
    "kernel": (9, 6),
    "vote_weight": (5, 54),
    "vote_bias": (5,),
    "gn_weight": (6,),
    "gn_bias": (6,),
}
"""What 0.2.0 wrote of a folded layer of 6 channels a group."""
REMEDY = "ema-timm 0.2.0 .* cannot be undone. Load the checkpoint that was saved before it"


def test_timm_reparameterizes_other_layers_and_leaves_ours_as_they_are():
    model = nn.Sequential(RepVggBlock(24, 24), EmaAttn(24, groups=4)).eval()
    small = reparameterize_model(model)
    assert len(small[0].state_dict()) < len(model[0].state_dict())
    assert isinstance(small[1], EmaAttn)
    assert list(small[1].state_dict()) == list(model[1].state_dict())
    x = torch.randn(2, 24, 7, 5)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(small[1](x), model[1](x))


def test_timm_reparameterizes_a_whole_network_with_our_layers():
    model = timm.create_model("resnet18", block_args={"attn_layer": EmaAttn}).eval()
    small, x = reparameterize_model(model), torch.randn(1, 3, 64, 64)
    assert sum(isinstance(m, EmaAttn) for m in small.modules()) == 8
    with torch.no_grad():
        assert torch.equal(small(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("prefix", "named"), [("", "this layer"), ("1.", "1")])
def test_a_state_dict_of_a_folded_layer_is_refused_with_the_remedy(prefix, named, strict):
    layer = EmaAttn(24, groups=4)
    model = nn.Sequential(nn.Identity(), layer) if prefix else layer
    state = {f"{prefix}folded.{name}": torch.zeros(shape) for name, shape in FOLDED.items()}
    with pytest.raises(RuntimeError, match=f"The weights of {named} are those of .*{REMEDY}"):
        model.load_state_dict(state, strict=strict)


def test_a_pickle_of_a_folded_layer_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match=f"FoldedEma.*{REMEDY}"):
        pickle.loads(b"cema_timm.attention\nFoldedEma\n.")
