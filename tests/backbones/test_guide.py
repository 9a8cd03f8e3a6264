"""The numbers in the guide of the backbones are the networks'."""

import re
from pathlib import Path

import pytest
import timm

from ema_timm.backbones.complexity import count_parameters

# The checkout's: the installed package has no guides.
GUIDE = Path(__file__).resolve().parents[2] / "ema_timm" / "backbones" / "README.md"
ROWS = re.findall(r"^\| (\w+_ema) \| ([\d,]+) \| ([\d,]+) \|$", GUIDE.read_text("utf-8"), re.M)


def test_the_table_is_found():
    assert len(ROWS) == 5


@pytest.mark.parametrize(("name", "with_ema", "plain"), ROWS, ids=lambda text: text)
def test_parameters_are_those_of_the_networks(name, with_ema, plain):
    for network, told in ((name, with_ema), (name.removesuffix("_ema"), plain)):
        assert f"{count_parameters(timm.create_model(network, device='meta')):,}" == told
