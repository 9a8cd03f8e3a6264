"""The card says what was measured, and nothing that was not."""

import copy

import pytest

from ema_timm.hub.card import card_text

RESULTS = {
    "architecture": "resnet18_ema",
    "base": {
        "model": "resnet18_ema",
        "weights": "timm/resnet18.a1_in1k",
        "hub_repository": "timm/resnet18.a1_in1k",
        "license": "apache-2.0",
    },
    "metrics": {"top1": 87.5, "top5": None, "loss": 0.4321, "correct": 7, "images": 8},
    "best_epoch": 3,
    "parameters": 11_696_552,
    "classes": ["cat", "dog"],
    "input": {"input_size": [3, 224, 224]},
    "data": {"train": {"images": 40}},
    "arguments": {
        "opt": "adamw",
        "lr": 5e-4,
        "weight_decay": 0.05,
        "epochs": 4,
        "batch_size": 8,
        "sched": "cosine",
        "smoothing": 0.1,
        "seed": 42,
    },
    "versions": {"timm": "1.0.31"},
    "device": "cpu",
}


def test_numbers_are_those_of_the_results():
    text = card_text(RESULTS)
    for said in ("87.50% (7 of 8)", "0.4321", "11,696,552", "3×224×224", '"cat", "dog"', "epoch 3"):
        assert said in text
    assert "Top-5" not in text
    assert "$" not in text
    assert "More Information Needed" not in text


def test_same_results_give_the_same_text_and_are_not_touched():
    results = copy.deepcopy(RESULTS)
    assert card_text(results) == card_text(results)
    assert results == RESULTS


def test_front_matter_is_yaml_that_names_the_base():
    import yaml

    _, front, _ = card_text(RESULTS).split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "timm"
    assert data["base_model"] == "timm/resnet18.a1_in1k"
    assert data["license"] == "apache-2.0"
    assert "ema-attention" in data["tags"]


@pytest.mark.parametrize("architecture", ["resnet18_ema", "resnet18"])
def test_only_ema_networks_claim_ema(architecture):
    results = {**RESULTS, "architecture": architecture}
    results["base"] = {**RESULTS["base"], "hub_repository": None, "license": None}
    text = card_text(results)
    ema = architecture.endswith("_ema")
    assert ("ICASSP" in text) == ema
    assert ("pip install ema-timm" in text) == ema
    assert "license:" not in text and "base_model:" not in text
