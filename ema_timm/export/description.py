"""The description that travels with a file: how to prepare images, and the names of the classes.

Its keys are those of config.json: ``architecture``, ``input_size``, ``interpolation``, ``mean``,
``std``, ``crop_pct``, ``crop_mode`` and ``label_names``. An ONNX file holds each as JSON in its
metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ema_timm.checkpoints.preprocessing import PREPROCESSING, check_preprocessing, preprocessing
from ema_timm.errors import UserError
from ema_timm.fields import check_fields

_KINDS = {
    "input_size": list,
    "interpolation": str,
    "mean": list,
    "std": list,
    "crop_pct": float,
    "crop_mode": str,
    "label_names": list,
}
"""What a reader needs, and the types."""

_AGAIN = "Export it again."


def describe(model: nn.Module, model_args: dict, image: tuple[int, int] | None = None) -> dict:
    """Describe a network.

    Args:
        model: The network.
        model_args: Arguments that rebuild it, as `open_network` returns them.
        image: (H, W), if the size of images is fixed.
    """
    data = preprocessing(model, model_args, {}, use_test_size=True)
    size = data["input_size"]
    data["input_size"] = (size[0], *(image or size[1:]))
    data["crop_pct"] = float(data["crop_pct"])
    return {
        "architecture": model.pretrained_cfg["architecture"],
        **{key: data[key] for key in PREPROCESSING},
        "label_names": class_labels(model.pretrained_cfg.get("label_names"), model.num_classes),
    }


def class_labels(names: list[str] | None, classes: int) -> list[str]:
    """Names of the classes: the checkpoint's own, else ImageNet's by timm, else numbers."""
    if isinstance(names, list | tuple) and len(names) == classes:
        return list(names)
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(classes)]
    return [str(index) for index in range(classes)]


def write_beside(path: Path, description: dict) -> None:
    """Write the description as a JSON file of the same name beside ``path``."""
    text = json.dumps(description, indent=2) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def write_into_onnx(path: Path, description: dict) -> None:
    """Put the description into the metadata of an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in description.items()})
    onnx.save(model, path)


def from_metadata(metadata: Mapping[str, str], path: Path) -> dict | None:
    """Read the description from the metadata of an ONNX file.

    Args:
        metadata: The metadata.
        path: The file, for errors.

    Returns:
        The description, or None if ema-timm has not written one.

    Raises:
        UserError: If it is damaged.
    """
    if "label_names" not in metadata:
        return None
    try:
        description = {key: json.loads(metadata.get(key, "null")) for key in _KINDS}
    except ValueError as error:
        raise UserError(f"the metadata of {path} cannot be read: {error}. {_AGAIN}") from error
    check_fields(description, _KINDS, f"the metadata of {path}", _AGAIN)
    check_preprocessing(description, f"the metadata of {path}")
    return description
