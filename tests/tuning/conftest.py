"""What every test of tuning has: a cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path))
    return tmp_path
