"""The cards of what the project offers: text from results, counts from the networks."""

import json
import os
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from timm.models import get_pretrained_cfg

from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.cards.warm_start import (
    BASES,
    counts,
    published,
    warm_start_card_text,
)
from ema_timm.training.quickstart import MODEL

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
FOLDERS = sorted(path.name for path in CARDS.iterdir())
WARM = [name for name in FOLDERS if ".warm_" in name]
QUICK = f"{MODEL}.quickstart_digits"


def results(folder):
    return json.loads((CARDS / folder / "results.json").read_text("utf-8"))


def test_every_offered_weight_has_a_card():
    assert [name.partition(".")[0] for name in WARM] == sorted(f"{base}_ema" for base in BASES)
    assert FOLDERS == sorted([*WARM, QUICK])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_card_is_generated_from_the_results_byte_for_byte(folder):
    found = results(folder)
    text = warm_start_card_text(found) if "warm_start" in found else card_text(found)
    assert (CARDS / folder / "README.md").read_bytes() == text.encode()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_counts_are_the_networks(folder):
    found = results(folder)
    args = {} if folder in WARM else {"num_classes": len(found["classes"])}
    counted = counts(found["architecture"], tuple(found["input"]["input_size"]), **args)
    assert counted["parameters"] == found["parameters"]
    for key in ("total", "ema", "ema_definition"):  # PyTorch's counter may learn new operators
        assert counted["macs"][key] == pytest.approx(found["macs"][key], rel=1e-2)


@pytest.mark.parametrize("folder", WARM)
def test_a_warm_start_is_the_one_that_timm_would_load(folder):
    found = results(folder)
    start, cfg = found["warm_start"], get_pretrained_cfg(folder)
    assert cfg.hf_hub_id == start["hub_repository"] == f"timm/{start['base']}"
    assert cfg.license == start["license"]
    assert list(cfg.input_size) == found["input"]["input_size"]
    assert timm.models.get_pretrained_cfg(start["base"]).hf_hub_id == cfg.hf_hub_id
    card = ModelCard((CARDS / folder / "README.md").read_text("utf-8"))
    assert card.data.base_model == start["hub_repository"]
    assert card.data.eval_results is None  # the base's accuracy was not measured here
    assert "computes the same function as" in card.text
    assert start["published"] and "as published" in card.text


@pytest.mark.skipif("TIMM_REPO" not in os.environ, reason="set TIMM_REPO to a clone of timm")
@pytest.mark.parametrize("folder", WARM)
def test_the_published_accuracies_are_those_in_timms_repository(folder):
    start = results(folder)["warm_start"]
    assert published(start["base"], os.environ["TIMM_REPO"]) == start["published"]


def test_the_quick_starts_results_are_of_a_run():
    found = results(QUICK)
    assert found["architecture"] == MODEL
    assert found["metrics"]["images"] == found["evaluation"]["data"]["images"] == 360
    assert found["metrics"]["top1"] == max(entry["top1"] for entry in found["history"])
    assert len(found["history"]) == found["arguments"]["epochs"]
    for name in found["plots"]:
        assert (CARDS / QUICK / name).read_bytes().startswith(b"\x89PNG")
