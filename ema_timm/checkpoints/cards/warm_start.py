"""Cards of the ``warm_`` tags: counts of the network, and timm's published accuracy of its base.

Write them again, with a clone of timm, by

    python -m ema_timm.checkpoints.cards.warm_start TIMM_REPO COMMIT model_cards
"""

import csv
import sys
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.checkpoints.cards import parts
from ema_timm.checkpoints.cards.parts import count_rows, fill, table, with_checksum, yaml_block
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.checkpoints.results import FORMAT

BASES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenetv2_100")
"""The networks whose default tag has a card here as a ``warm_`` tag."""

_SOURCE = "https://github.com/huggingface/pytorch-image-models/blob/{}/results/results-imagenet.csv"


def warm_start_results(base: str, timm_repo: str | Path, commit: str) -> dict:
    """The results.json of a network with EMA attention that starts from the default weights.

    Args:
        base: timm's network without EMA attention.
        timm_repo: A clone of timm, for its published accuracies.
        commit: The clone's commit, for the link to them.
    """
    plain, cfg = get_pretrained_cfg(base), get_pretrained_cfg(f"{base}_ema")
    return {
        "format": FORMAT,
        "architecture": f"{base}_ema",
        "tag": cfg.tag,
        "task": "image-classification",
        **counts(f"{base}_ema", cfg.input_size),
        "input": {"input_size": list(cfg.input_size)},
        "warm_start": {
            "base": f"{base}.{plain.tag}",
            "hub_repository": cfg.hf_hub_id,
            "license": cfg.license,
            "published": published(f"{base}.{plain.tag}", timm_repo),
            "source": _SOURCE.format(commit),
        },
    }


def counts(architecture: str, input_size: tuple[int, int, int], **model_args) -> dict:
    """``parameters`` and ``macs`` of a network, from its shapes."""
    with torch.device("meta"):
        network = timm.create_model(architecture, **model_args)
    return {"parameters": count_parameters(network), "macs": count_macs(network, input_size)}


def published(name: str, timm_repo: str | Path) -> list[dict]:
    """The accuracies on ImageNet-1k that timm publishes of a model, smallest images first."""
    file = Path(timm_repo) / "results" / "results-imagenet.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] == name]
    kinds = {"img_size": int, "crop_pct": float, "interpolation": str, "top1": float, "top5": float}
    entries = [{key: kind(row[key]) for key, kind in kinds.items()} for row in rows]
    return sorted(entries, key=lambda entry: entry["img_size"])


def warm_start_card_text(results: dict) -> str:
    """The README.md of a warm start; the same results give the same text."""
    start = results["warm_start"]
    facts = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "ema-attention"],
        "license": start["license"],
        "base_model": start["hub_repository"],
    }
    size = "×".join(map(str, results["input"]["input_size"]))
    body = fill(
        "warm_start.md",
        name=f"{results['architecture']}.{results['tag']}",
        base=start["base"],
        repository=start["hub_repository"],
        numbers=table([("Input", size), *count_rows(results)], "counted"),
        convention=results["macs"]["convention"],
        published=_published_table(start["published"]),
        source=start["source"],
        citation=f"{parts.CITE_EMA}\n\n{parts.CITE_TIMM}",
    )
    return with_checksum(yaml_block(facts) + body)


def _published_table(rows: list[dict]) -> str:
    lines = [
        f"| {row['img_size']} | {row['crop_pct']:g} | {row['top1']:.3f} | {row['top5']:.3f} |"
        for row in rows
    ]
    head = ["| image size | crop | top-1 (%), as published | top-5 (%), as published |"]
    return "\n".join([*head, "|---:|---:|---:|---:|", *lines])


def write_cards(timm_repo: str | Path, commit: str, output: str | Path) -> None:
    """Write ``<architecture>.<tag>/results.json`` and ``README.md`` of every warm start."""
    for base in BASES:
        results = warm_start_results(base, timm_repo, commit)
        folder = CheckpointWriter(Path(output) / f"{results['architecture']}.{results['tag']}")
        folder.make()
        folder.write_json(RESULTS, results)
        folder.write_text(CARD, warm_start_card_text(results))


if __name__ == "__main__":
    write_cards(*sys.argv[1:])
