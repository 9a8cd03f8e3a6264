"""A detector as a folder with its metrics, from ultralytics' own validation, and its card."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import RESULTS, read_json
from ema_timm.environment import versions
from ema_timm.errors import UserError, sentence
from ema_timm.integrations.yolo.card import write_detector_card
from ema_timm.integrations.yolo.check import is_detector
from ema_timm.integrations.yolo.contents import read_description
from ema_timm.integrations.yolo.detector import require_ultralytics
from ema_timm.integrations.yolo.files import open_detector
from ema_timm.integrations.yolo.folder import load, save_folder
from ema_timm.integrations.yolo.results import carried, known_facts

# What ultralytics raises for a data set that is missing or wrongly described.
_DATA = (FileNotFoundError, SyntaxError, RuntimeError, ValueError)


def make_folder(
    source: str | Path,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    imgsz: int | None = None,
    split: str = "val",
    device: str | None = None,
) -> tuple[Path, dict]:
    """Write a checkpoint as a folder, measure it and write its card.

    Args:
        source: A checkpoint ``.pt``, or a folder that exists.
        folder: The folder to write; None if ``source`` is the folder.
        data: As in `measure_folder`; None measures nothing.
        imgsz: As in `measure_folder`.
        split: As in `measure_folder`.
        device: As in `measure_folder`.

    Returns:
        The folder, and the content of its results.json.

    Raises:
        UserError: If the source or the data set cannot be read.
        EditedCardError: If the folder has a card that was edited by hand; the rest is written.
    """
    if folder is None:
        if not is_detector(source):
            raise UserError(
                f"{source} is not the folder of a detector. Write one first: ema-timm yolo "
                "MODEL.pt --folder DIR"
            )
        folder = source
    elif Path(source).suffix != ".pt":
        raise UserError(f"a folder is made of a checkpoint .pt, got {source}.")
    else:
        save_folder(open_detector(source), folder)
    folder = Path(folder)
    if data is not None:
        measure_folder(folder, data, imgsz, split=split, device=device)
    write_detector_card(folder)
    return folder, read_json(folder / RESULTS, "Run the command again.")


def measured_lines(results: dict) -> list[str]:
    """A line for each metric, or one that says that nothing was measured."""
    metrics = dict(results.get("metrics") or {})
    if not metrics:
        return ["not measured: --data DATA.yaml does that"]
    images = metrics.pop("images")
    return [*(f"{name}: {value:.4f}" for name, value in metrics.items()), f"images: {images}"]


def measure_folder(
    folder: str | Path,
    data: str | Path,
    imgsz: int | None = None,
    batch: int = 16,
    split: str = "val",
    device: str | None = None,
) -> dict:
    """Measure a folder's detector by ``YOLO.val`` and write the folder's results.json.

    Args:
        folder: What `ema_timm.integrations.yolo.save_folder` wrote.
        data: The data set as ultralytics names it: a YAML, or a folder for classification.
        imgsz: Size of the images in pixels; the detector's own by default.
        batch: Batch size.
        split: "val", "test" or "train".
        device: As ultralytics names it; None lets ultralytics choose.

    Returns:
        The content of results.json.

    Raises:
        UserError: If the folder or the data set cannot be read, or has no such images or classes.
    """
    require_ultralytics()
    folder = Path(folder)
    yolo = load(folder)
    facts = known_facts(folder, read_description(folder), yolo)
    before = carried(folder, facts)
    validator = _validated(yolo, data, imgsz, batch, split, device)
    found = {
        name.removeprefix("metrics/"): round(float(value), 6)
        for name, value in validator.metrics.results_dict.items()
        if name != "fitness"
    }
    seen = _data(validator, data, split)
    results = {
        **before,
        **facts,
        "metrics": {**found, "images": seen["images"]},
        "evaluation": {"data": seen, **_conditions(validator)},
    }
    CheckpointWriter(folder).write_json(RESULTS, results)
    return results


def _validated(yolo: Any, data, imgsz, batch, split, device) -> Any:
    """The validator of ultralytics, after its run."""
    ended: list[Any] = []
    classes = yolo.model.names

    def check_classes(validator) -> None:
        theirs = validator.data.get("names") or {}
        if len(theirs) != len(classes):
            raise UserError(
                f"{data} has {len(theirs)} classes, but the detector has {len(classes)}. Give the "
                "data set that it was trained for."
            )

    yolo.add_callback("on_val_start", check_classes)
    yolo.add_callback("on_val_end", ended.append)
    settings = {"imgsz": imgsz, "device": device}
    settings = {key: value for key, value in settings.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="ema-timm-") as scratch:
        try:
            yolo.val(
                data=str(data),
                batch=batch,
                split=split,
                plots=False,
                project=scratch,
                name="val",
                **settings,
            )
        except _DATA as error:
            raise UserError(
                f"ultralytics cannot measure on {data}: {sentence(error)} Give a data set that "
                "ultralytics knows by name, or your own YAML."
            ) from error
    return ended[-1]


def _data(validator: Any, data: str | Path, split: str) -> dict:
    """The measured images, without local paths."""
    images = validator.dataloader.dataset
    files = getattr(images, "im_files", None) or [sample[0] for sample in images.samples]
    labels = getattr(images, "labels", None)
    return {
        "name": Path(data).stem,
        "split": split,
        "images": len(files),
        "instances": sum(len(each["cls"]) for each in labels) if labels else None,
        "fingerprint": _fingerprint(files, getattr(images, "label_files", ())),
    }


def _fingerprint(images: list[str], labels) -> str:
    """Sha256 over name and size of every image, in order, and over every label file."""
    digest = hashlib.sha256()
    for file in map(Path, images):
        digest.update(os.fsencode(f"{file.parent.name}/{file.name}\t{file.stat().st_size}\n"))
    for file in map(Path, labels):
        digest.update(file.read_bytes() if file.is_file() else b"no labels")
    return digest.hexdigest()


def _conditions(validator: Any) -> dict:
    """Settings and versions, so that others can repeat the measurement."""
    from ultralytics import __version__

    said = validator.args
    half = bool(getattr(said, "half", False)) or getattr(said, "quantize", None) == 16
    return {
        "imgsz": said.imgsz,
        "batch_size": said.batch,
        "conf": said.conf,
        "iou": said.iou,
        "rect": bool(said.rect),
        "dtype": "float16" if half else "float32",
        "device": validator.device.type,
        "versions": {"ultralytics": __version__, **versions()},
    }
