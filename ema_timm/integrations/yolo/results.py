"""results.json of a detector's folder: its metadata and metrics.

One JSON object, with the rules of `ema_timm.checkpoints.results`:

- ``format``, ``architecture``, ``task`` (of ultralytics: "detect", ...), ``weights_sha256``,
  ``parameters``, ``classes`` (names in the order of their numbers).
- ``detector``: ``decoder``, ``imgsz``, ``license``, ``ultralytics``, as in detector.json.
- ``layers``: of each EMA layer its ``row``, ``channels`` and ``groups``; of a layer that is not the
  whole row, such as one inside a block, also the name of its ``module`` in the row.
- ``metrics``, if it was measured: those of ultralytics' own validation, by its names
  ("mAP50(B)", "mAP50-95(B)", ... from 0 to 1), and ``images``.
- ``evaluation``: ``data`` (``name``, ``split``, ``images``, ``instances``, ``fingerprint``) and how
  it was measured: ``imgsz``, ``batch_size``, ``conf``, ``iou``, ``rect``, ``dtype``, ``device``,
  ``versions``.
- ``card``: options of ``ema-timm card``: ``datasets``, ``base_model``, ``repo_id``.
"""

from pathlib import Path
from typing import Any

from ema_timm.backbones.complexity import count_parameters
from ema_timm.checkpoints.layout import RESULTS, WEIGHTS, read_json
from ema_timm.checkpoints.results import FORMAT, carried_over, check_format
from ema_timm.checkpoints.schema import CARD_FIELDS
from ema_timm.errors import UserError
from ema_timm.fields import check_fields
from ema_timm.files import sha256
from ema_timm.integrations.yolo.detector import ema_layers

_FIELDS = {"card?": CARD_FIELDS, "evaluation?": {"data?": dict}, "metrics?": {"*": float}}
_DESCRIBED = ("decoder", "imgsz", "license", "ultralytics")


def known_facts(folder: Path, described: dict, yolo: Any) -> dict:
    """The metadata of a detector.

    Args:
        folder: Its folder.
        described: Content of its detector.json.
        yolo: The detector that was loaded from it.
    """
    net = yolo.model
    return {
        "format": FORMAT,
        "architecture": str(described.get("architecture", "yolo")),
        "task": described["task"],
        "weights_sha256": sha256(folder / WEIGHTS),
        "parameters": count_parameters(net),
        "classes": [net.names[number] for number in sorted(net.names)],
        "detector": {key: described[key] for key in _DESCRIBED if key in described},
        "layers": [
            {
                "row": row,
                **({"module": name.rstrip(".")} if name else {}),
                "channels": layer.channels,
                "groups": layer.groups,
            }
            for row, name, layer in ema_layers(net)
        ],
    }


def carried(folder: Path, facts: dict) -> dict:
    """The content of results.json; if it is of other weights, only the card's fields.

    Raises:
        UserError: If there is one that cannot be read.
    """
    if not (folder / RESULTS).is_file():
        return {}
    return carried_over(_read(folder), facts["weights_sha256"])


def read_own_results(folder: Path, facts: dict) -> dict:
    """Read a folder's results.json, which must be of the folder's detector.

    Raises:
        UserError: If it is missing, damaged, or of another detector.
    """
    results = _read(folder)
    other = [key for key, value in facts.items() if results.get(key) != value]
    if other:
        raise UserError(
            f"{folder / RESULTS} is of another detector ({', '.join(other)}). Write it again: "
            f"ema-timm card {folder}, or measure: ema-timm yolo {folder} --data DATA.yaml"
        )
    _check_measured(folder, results)
    return results


def _read(folder: Path) -> dict:
    remedy = f"Write it with: ema-timm card {folder}"
    results = read_json(folder / RESULTS, remedy)
    check_format(results, folder / RESULTS)
    check_fields(results, _FIELDS, folder / RESULTS, f"Remove it. {remedy}")
    return results


def _check_measured(folder: Path, results: dict) -> None:
    """Raise UserError for metrics without the data that they are of."""
    metrics, data = results.get("metrics"), results.get("evaluation", {}).get("data")
    if metrics is None and data is None:
        return
    whole = isinstance(metrics, dict) and isinstance(data, dict)
    whole = whole and all(isinstance(value, int | float) for value in metrics.values())
    whole = whole and {"name", "split", "images", "fingerprint"} <= data.keys()
    if not whole or metrics.get("images") != data["images"]:
        raise UserError(
            f"{folder / RESULTS} has metrics without their data. Measure again: "
            f"ema-timm yolo {folder} --data DATA.yaml"
        )
