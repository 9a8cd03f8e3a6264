"""The run that most tests of training start."""

import pytest

from ema_timm.training.settings import FinetuneConfig


@pytest.fixture
def config(digits, tmp_path):
    return FinetuneConfig(
        model="test_resnet_ema",
        data_dir=str(digits),
        output=str(tmp_path / "run"),
        pretrained=False,
        img_size=32,
        epochs=3,
        batch_size=12,
        lr=4e-3,
        hflip=0.0,
        device="cpu",
        workers=0,
    )
