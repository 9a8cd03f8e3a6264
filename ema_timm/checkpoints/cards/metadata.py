"""The YAML at the top of a model card, which the Hub indexes."""

from pathlib import Path

from ema_timm.backbones.rebuild import ANY
from ema_timm.checkpoints.cards.parts import model_index, yaml_block


def front_matter(results: dict) -> str:
    """The metadata block, without unknown fields.

    Args:
        results: Content of results.json.
    """
    card, base = results.get("card", {}), results.get("base") or {}
    tags = ["image-classification", "timm", "transformers"]
    if is_ema(results):
        tags.append("ema-attention")
    facts = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": tags,
        "license": card.get("license") or base.get("license"),
        "license_name": card.get("license_name"),
        "license_link": card.get("license_link"),
        "datasets": card.get("datasets"),
        "base_model": card.get("base_model") or base.get("hub_repository"),
        "metrics": ["accuracy"] if results.get("metrics") else None,
        "model-index": _model_index(results),
    }
    return yaml_block(facts)


def is_ema(results: dict) -> bool:
    """Whether a network has EMA attention, by its name and its multiply-accumulates."""
    name = results["architecture"]
    if not (name.endswith("_ema") or name == ANY):
        return False
    return (results.get("macs") or {}).get("ema") != 0  # 0 if it has other layers in their place


def measured_on(results: dict) -> dict:
    """The images that ``metrics`` are of: ``name`` and ``split``, each None if unknown."""
    data = results.get("evaluation", {}).get("data")
    if data:
        return {"name": data["name"], "split": data["split"]}
    arguments = results.get("arguments") or {}
    name = Path(arguments["data_dir"]).name if arguments.get("data_dir") else None
    return {"name": name, "split": "val" if name else None}


def _model_index(results: dict) -> list | None:
    metrics, card = results.get("metrics"), results.get("card", {})
    where = measured_on(results)
    if not metrics or not (where["name"] or card.get("datasets")):
        return None
    # The Hub's name for a folder of images with one folder a class.
    dataset = {"type": "imagefolder", "name": where["name"]}
    if card.get("datasets"):
        dataset = {"type": card["datasets"][0], "name": card["datasets"][0]}
    if where["split"]:
        dataset["split"] = where["split"]
    measured = [("accuracy", "Top-1 accuracy", round(metrics["top1"] / 100, 6))]
    if metrics.get("top5") is not None:
        measured.append(("top_5_accuracy", "Top-5 accuracy", round(metrics["top5"] / 100, 6)))
    measured.append(("loss", "Cross-entropy", round(metrics["loss"], 6)))
    task = ("image-classification", "Image classification")
    return model_index(results, task, dataset, measured)
