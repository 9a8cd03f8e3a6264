"""A detector as a folder without a pickle: safetensors, the model YAML and a description.

YOLO's own ``.pt`` is a pickle, which runs what it likes when it is loaded. Here the weights are
numbers, and the YAML is read only after every row of it is known to name a layer: ultralytics
looks a row's name up in a module that holds more than layers, and evaluates ``activation``.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ema_timm.errors import UserError
from ema_timm.files import make_writable, write_whole
from ema_timm.integrations.yolo.detector import network_of, require_ultralytics
from ema_timm.integrations.yolo.files import is_rounded
from ema_timm.integrations.yolo.rows import rows_of, yaml_text

WEIGHTS = "model.safetensors"
MODEL = "model.yaml"
DESCRIPTION = "detector.json"
LICENSE = "agpl-3.0"

_ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Za-z0-9]+\([0-9A-Za-z_=., -]*\)")
_REMEDY = "Write the folder anew, or fetch it again from where it was whole"


def save_folder(yolo: Any, folder: str | Path) -> list[Path]:
    """Write a detector as a folder.

    Args:
        yolo: A YOLO or RTDETR object, not fused.
        folder: Where to; made if it is not there.

    Returns:
        The files.

    Raises:
        UserError: If the network is fused, or the folder cannot be written to.
    """
    require_ultralytics()
    net, folder = network_of(yolo), Path(folder)
    if net.is_fused():
        raise UserError(
            "this network's norms are fused into its convolutions, so no YAML describes it. Load "
            "the checkpoint anew, before predict() or fuse()."
        )
    make_writable(folder)
    half = is_rounded(net)
    weights = {
        name: (t.half() if half and t.dtype == torch.float32 else t).contiguous().cpu()
        for name, t in net.state_dict().items()
    }
    from ultralytics import __version__

    described = {
        "task": yolo.task,
        "decoder": type(yolo).__name__,
        "names": {str(number): name for number, name in net.names.items()},
        "imgsz": yolo.overrides.get("imgsz", 640),
        "license": LICENSE,
        "ultralytics": __version__,
    }
    content = save(weights, metadata={"format": "pt"})
    write_whole(folder / WEIGHTS, lambda path: path.write_bytes(content))
    for name, text in (
        (MODEL, yaml_text(net.yaml)),
        (DESCRIPTION, json.dumps(described, indent=2) + "\n"),
    ):
        write_whole(folder / name, lambda path, text=text: path.write_text(text, "utf-8"))
    return [folder / name for name in (WEIGHTS, MODEL, DESCRIPTION)]


def load(source: str | Path, revision: str | None = None) -> Any:
    """Rebuild the YOLO or RTDETR object from what `save_folder` wrote; no pickle is read.

    Args:
        source: The folder, or ``USER/NAME`` on the Hub.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The object; ``train()``, ``val()``, ``predict()`` and ``export()`` take it from there.

    Raises:
        UserError: If a file is missing or damaged, a row of the YAML names no layer, or the
            weights are not those of the network.
    """
    require_ultralytics()
    folder = Path(source) if Path(source).is_dir() else _fetched(str(source), revision)
    described = _description(folder)
    config = _model_yaml(folder)
    refuse_what_is_no_layer(config)
    import ultralytics

    kind = {"YOLO": ultralytics.YOLO, "RTDETR": ultralytics.RTDETR}[described["decoder"]]
    with tempfile.TemporaryDirectory(prefix="ema-timm-") as scratch:
        file = Path(scratch) / MODEL
        file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
        settings = {} if described["decoder"] == "RTDETR" else {"task": described["task"]}
        yolo = kind(str(file), **settings)
    net = yolo.model
    _load_weights(net, folder / WEIGHTS)
    net.names = {int(number): name for number, name in described["names"].items()}
    net.yaml["yaml_file"] = str(folder / MODEL)
    yolo.ckpt = {"model": net}  # with it, train() starts from these weights
    # No such file: workers that would load one must miss it, not build the YAML without weights.
    yolo.overrides |= {"model": str(folder / "model.pt"), "imgsz": described["imgsz"]}
    net.eval()
    return yolo


def refuse_what_is_no_layer(config: dict) -> None:
    """Refuse a model YAML that could make ultralytics call anything but a layer.

    Raises:
        UserError: For the first row whose module is no ``torch.nn.Module``, or an activation that
            is more than a layer with plain arguments.
    """
    import ultralytics.nn.tasks as tasks

    activation = config.get("activation")
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        raise UserError(f"{MODEL}: activation must be like nn.SiLU(), got {activation!r}.")
    for number, row in enumerate(rows_of(config)):
        name = str(row[2])
        if name.startswith("nn."):
            found = getattr(nn, name[3:], None)
        elif name.startswith("torchvision.ops."):
            import torchvision

            found = getattr(torchvision.ops, name[16:], None)
        else:
            found = vars(tasks).get(name)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UserError(
                f"{MODEL}: row {number} names {name!r}, which is no layer that this ultralytics "
                "has. Install the version that detector.json names, and trust no other YAML."
            )


def _fetched(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [WEIGHTS, MODEL, DESCRIPTION]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{repo} is neither a folder nor on the Hub: {str(error).splitlines()[0]}"
        ) from error


def _description(folder: Path) -> dict:
    file = folder / DESCRIPTION
    try:
        described = json.loads(file.read_text("utf-8"))
        whole = described["decoder"] in ("YOLO", "RTDETR") and isinstance(described["task"], str)
        whole = whole and isinstance(described["imgsz"], int | list)
        whole = whole and all(int(number) >= 0 for number in described["names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is missing or damaged. {_REMEDY}.") from error
    if not whole:
        raise UserError(f"{file} describes no detector. {_REMEDY}.")
    return described


def _model_yaml(folder: Path) -> dict:
    file = folder / MODEL
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is missing or damaged. {_REMEDY}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} describes no detector. {_REMEDY}.")
    return config


def _load_weights(net: nn.Module, file: Path) -> None:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged. {_REMEDY}.") from error
    own = net.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise UserError(
            f"{file} is not of the network that {MODEL} describes: {len(wrong)} tensors differ, "
            f"first {wrong[0]}. Put the files of one detector together."
        )
    bad = [n for n, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{file}: {bad[0]} holds NaN or infinite values. {_REMEDY}.")
    net.load_state_dict(weights)
