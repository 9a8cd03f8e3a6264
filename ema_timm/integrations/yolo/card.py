"""The model card of a detector's folder, written from results.json. Edited cards are kept."""

import json
from pathlib import Path

from ema_timm.checkpoints.cards import parts
from ema_timm.checkpoints.cards.file import WrittenCard, check_card_fields, save_card
from ema_timm.checkpoints.cards.parts import (
    card_name,
    fill,
    listed,
    model_index,
    table,
    versions_text,
    with_checksum,
    yaml_block,
)
from ema_timm.checkpoints.layout import RESULTS
from ema_timm.errors import UserError
from ema_timm.integrations.yolo.contents import DESCRIPTION, read_description
from ema_timm.integrations.yolo.folder import load
from ema_timm.integrations.yolo.results import carried, known_facts
from ema_timm.names import code, escape

CARD_FIELDS = ("datasets", "base_model", "repo_id")
"""Fields that cannot be measured. The licence is that of detector.json."""

# The Hub's names for what ultralytics calls a task.
_PIPELINES = {
    "detect": ("object-detection", "Object detection"),
    "obb": ("object-detection", "Object detection"),
    "segment": ("image-segmentation", "Image segmentation"),
    "semantic": ("image-segmentation", "Image segmentation"),
    "pose": ("keypoint-detection", "Keypoint detection"),
    "classify": ("image-classification", "Image classification"),
    "depth": ("depth-estimation", "Depth estimation"),
}
_KINDS = {
    "mAP50": ("map_50", "mAP@0.5"),
    "mAP50-95": ("map_50_95", "mAP@0.5:0.95"),
    "accuracy_top1": ("accuracy", "Top-1 accuracy"),
    "accuracy_top5": ("top_5_accuracy", "Top-5 accuracy"),
}
_OF = {"B": "boxes", "M": "masks", "P": "keypoints"}


def write_detector_card(
    folder: str | Path, fields: dict | None = None, force: bool = False
) -> WrittenCard:
    """Write a detector folder's README.md and, if it is missing, its results.json.

    Args:
        folder: What `ema_timm.integrations.yolo.save_folder` wrote.
        fields: Fields that cannot be measured (`CARD_FIELDS`); saved in results.json.
        force: Replace a card that was edited by hand.

    Raises:
        EditedCardError: If the card was edited by hand and ``force`` is off.
        UserError: If the folder is damaged, or another field is given.
    """
    folder, fields = Path(folder), fields or {}
    other = [name for name in fields if name not in CARD_FIELDS]
    if other:
        raise UserError(
            f"--{other[0].replace('_', '-')} is not for detectors: their licence is that of "
            f"ultralytics, which {folder / DESCRIPTION} names. Leave it out."
        )
    check_card_fields(fields)
    facts = known_facts(folder, read_description(folder), load(folder))
    before = carried(folder, facts)
    results = {**before, **facts}
    if fields:
        results["card"] = {**before.get("card", {}), **fields}
    new_results = results != before or not (folder / RESULTS).is_file()
    changed = save_card(folder, detector_card_text(results), results, new_results, force)
    unknown = [name for name in ("datasets",) if not results.get("card", {}).get(name)]
    return WrittenCard(changed, unknown)


def detector_card_text(results: dict) -> str:
    """The README.md of a detector's folder; the same results give the same text.

    Args:
        results: Content of results.json (`ema_timm.integrations.yolo.results` lists it).
    """
    about, repository = results["detector"], results.get("card", {}).get("repo_id")
    body = fill(
        "detector.md",
        name=escape(card_name(results)),
        what=_what(results),
        numbers=_numbers(results),
        measured=_measured(results),
        source=json.dumps(repository or "PATH/TO/THIS/FOLDER"),
        decoder=about["decoder"],
        where=""
        if repository
        else ' From the Hugging Face Hub, `load("USER/NAME")` does the same.',
        limits=_limits(results),
        licence=_licence(about["license"]),
        citation=parts.CITE_EMA,
    )
    return with_checksum(_front_matter(results) + body)


def _what(results: dict) -> str:
    about = results["detector"]
    made = f"{code(results['architecture'])}, a {about['decoder']} network of ultralytics"
    made += f" {escape(str(about['ultralytics']))}" if "ultralytics" in about else ""
    task = _PIPELINES.get(results["task"], ("", escape(results["task"])))[1].lower()
    if not results["layers"]:
        return f"{made}, for {task}."
    return f"{made}, for {task}, with {parts.EMA_ATTENTION}"


def _numbers(results: dict) -> str:
    layers = results["layers"]
    places = ", ".join(map(str, dict.fromkeys(layer["row"] for layer in layers)))
    rows = [(escape(_label(name)), f"{value:.4f}") for name, value in _scores(results)]
    metrics = results.get("metrics")
    rows += [
        ("Images", str(metrics["images"]) if metrics else None),
        ("Classes", str(len(results["classes"]))),
        ("Image size it was trained for", _size(results["detector"]["imgsz"])),
        ("Parameters", f"{results['parameters']:,}"),
        ("EMA layers", f"{len(layers)} (rows {places})" if layers else None),
    ]
    return table(rows, "measured" if metrics else "counted")


def _scores(results: dict) -> list[tuple[str, float]]:
    metrics = results.get("metrics") or {}
    return [(name, value) for name, value in metrics.items() if name != "images"]


def _label(name: str) -> str:
    """The usual name of a metric: "mAP@0.5, boxes" for "mAP50(B)"."""
    kind, _, of = name.partition("(")
    shown = _KINDS.get(kind, ("", kind.capitalize()))[1]
    return f"{shown}, {_OF.get(of.rstrip(')'), of.rstrip(')'))}" if of else shown


def _size(imgsz: int | list[int]) -> str:
    return "×".join(map(str, imgsz)) if isinstance(imgsz, list) else str(imgsz)


def _measured(results: dict) -> str:
    done = results.get("evaluation")
    if not results.get("metrics") or not done:
        return (
            "Nothing was measured of these weights: how well they detect is not known. "
            "`ema-timm yolo FOLDER --data DATA.yaml` measures it."
        )
    data = done["data"]
    labels = f" with {data['instances']} labels" if data.get("instances") is not None else ""
    return (
        "## How it was measured\n\n"
        f"By ultralytics' own validation on the {data['images']} images{labels} of "
        f"{code('/'.join((data['name'], data['split'])))} (fingerprint "
        f"{code(data['fingerprint'][:12])}), at {_size(done['imgsz'])} pixels, "
        f"{escape(done['dtype'])}, confidence from {done['conf']}, IoU of suppression "
        f"{done['iou']}, on {escape(done['device'])}, with "
        f"{versions_text(done['versions'])}."
    )


def _limits(results: dict) -> str:
    classes = results["classes"]
    known = f"{len(classes)} class{'es' if len(classes) > 1 else ''}"
    return f"It knows {known}: {listed(classes)}. Other images were not tried."


def _licence(name: str) -> str:
    return (
        f"{escape(name)}: what ultralytics stamps into the checkpoints that it trains and saves "
        "(https://ultralytics.com/license). The layer and the loader, ema-timm, are Apache-2.0."
    )


def _front_matter(results: dict) -> str:
    card = results.get("card", {})
    pipeline = _PIPELINES.get(results["task"], (None,))[0]
    family = "rt-detr" if results["detector"]["decoder"] == "RTDETR" else "yolo"
    tags = ["ultralytics", family, pipeline, "ema-attention" if results["layers"] else None]
    facts = {
        "library_name": "ultralytics",
        "pipeline_tag": pipeline,
        "tags": [tag for tag in tags if tag],
        "license": results["detector"]["license"],
        "datasets": card.get("datasets"),
        "base_model": card.get("base_model"),
        "model-index": _model_index(results),
    }
    return yaml_block(facts)


def _model_index(results: dict) -> list | None:
    card, pipeline = results.get("card", {}), _PIPELINES.get(results["task"])
    if not results.get("metrics") or not pipeline:
        return None
    data = results["evaluation"]["data"]
    metrics = [
        (_KINDS[kind][0], _label(name), value)
        for name, value in _scores(results)
        if (kind := name.partition("(")[0]) in _KINDS
    ]
    name = (card.get("datasets") or [data["name"]])[0]
    dataset = {"type": name, "name": name, "split": data["split"]}
    return model_index(results, pipeline, dataset, metrics)
