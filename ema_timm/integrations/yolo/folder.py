"""A detector as a folder without a pickle: safetensors, the model YAML and a description.

YOLO's own ``.pt`` is a pickle, which can run any code when it is loaded. Here the weights are
numbers, and `ema_timm.integrations.yolo.contents` checks the YAML.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.errors import UserError, sentence
from ema_timm.files import WEIGHTS
from ema_timm.hub.fetch import fetch
from ema_timm.integrations.yolo.contents import (
    DESCRIPTION,
    MODEL,
    check_tensors,
    read_description,
    read_model_yaml,
    read_weights,
)
from ema_timm.integrations.yolo.detector import network_of, require_ultralytics
from ema_timm.integrations.yolo.files import is_rounded
from ema_timm.integrations.yolo.rows import yaml_text

LICENSE = "agpl-3.0"
"""The licence that ultralytics writes into its checkpoints."""


def save_folder(yolo: Any, folder: str | Path) -> list[Path]:
    """Write a detector as a folder.

    Args:
        yolo: A YOLO or RTDETR object, not fused.
        folder: The folder; created if it does not exist.

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
            "the checkpoint again, before predict() or fuse()."
        )
    writer = CheckpointWriter(folder)
    writer.make()
    half = is_rounded(net)
    weights = {
        name: (t.half() if half and t.dtype == torch.float32 else t).contiguous().cpu()
        for name, t in net.state_dict().items()
    }
    from ultralytics import __version__

    described = {
        "architecture": _architecture(net.yaml),
        "task": yolo.task,
        "decoder": type(yolo).__name__,
        "names": {str(number): name for number, name in net.names.items()},
        "imgsz": yolo.overrides.get("imgsz", 640),
        "license": LICENSE,
        "ultralytics": __version__,
    }
    content = save(weights, metadata={"format": "pt"})
    writer.write(WEIGHTS, lambda path: path.write_bytes(content))
    writer.write_text(MODEL, yaml_text(net.yaml))
    writer.write_json(DESCRIPTION, described)
    return [folder / name for name in (WEIGHTS, MODEL, DESCRIPTION)]


def _architecture(config: dict) -> str:
    """The name of the YAML that a network was first built from, such as yolo11n."""
    return Path(str(config.get("yaml_file", "yolo"))).stem


def load(source: str | Path, revision: str | None = None) -> Any:
    """Rebuild the YOLO or RTDETR object of a folder; no pickle is read.

    Args:
        source: A folder that `save_folder` wrote, or ``USER/NAME`` on the Hub.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The object, ready for ``train()``, ``val()``, ``predict()`` and ``export()``.

    Raises:
        UserError: If a file is missing or damaged, a row of the YAML does not name a layer, or the
            weights are not those of the network.
        HubError: If a download from the Hub fails.
    """
    require_ultralytics()
    folder = Path(source) if Path(source).is_dir() else _fetched(source, revision)
    described, config = read_description(folder), read_model_yaml(folder)
    check_tensors(config, folder / WEIGHTS)
    weights = read_weights(folder / WEIGHTS)
    yolo = _built(described, config)
    net = yolo.model
    net.load_state_dict(weights)
    net.names = {int(number): name for number, name in described["names"].items()}
    # There is no such file; it names the network when the detector is saved again.
    net.yaml["yaml_file"] = str(folder / f"{described.get('architecture', 'yolo')}.yaml")
    yolo.ckpt = {"model": net}  # with it, train() starts from these weights
    # There is no such file: workers that load one must fail, not build the YAML without weights.
    yolo.overrides |= {"model": str(folder / "model.pt"), "imgsz": described["imgsz"]}
    net.eval()
    return yolo


def _built(described: dict, config: dict) -> Any:
    import ultralytics

    kind = {"YOLO": ultralytics.YOLO, "RTDETR": ultralytics.RTDETR}[described["decoder"]]
    settings = {} if described["decoder"] == "RTDETR" else {"task": described["task"]}
    with tempfile.TemporaryDirectory(prefix="ema-timm-") as scratch:
        file = Path(scratch) / MODEL
        file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
        with _quiet_about_the_scale():
            return kind(str(file), **settings)


@contextlib.contextmanager
def _quiet_about_the_scale() -> Iterator[None]:
    """Hide the warning that the first scale is assumed: the right one is written first."""

    def is_other(record: logging.LogRecord) -> bool:
        return "no model scale passed" not in record.getMessage()

    logger = logging.getLogger("ultralytics")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _fetched(source: str | Path, revision: str | None) -> Path:
    """A folder with a repository's three files, of one commit and compared with their hashes."""
    if Path(source).is_file():
        raise UserError(
            f"{source} is a file. YOLO(...) loads a .pt; write it as a folder with: "
            f"ema-timm yolo {source} --folder DIR"
        )
    repo = str(source)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo} is neither a folder nor on the Hub: {sentence(error)}") from error
    described = _fetch(f"{repo}@{revision}" if revision else repo, DESCRIPTION)
    commit = described.parent.name  # the client caches files by commit
    for name in (MODEL, WEIGHTS):
        _fetch(f"{repo}@{commit}", name)
    return described.parent


def _fetch(where: str, name: str) -> Path:
    file = fetch(where, name)
    if file is None:
        raise UserError(
            f"{where} on the Hub has no {name}, so ema-timm has not published a detector there. A "
            ".pt is not read: it is a pickle, which can run any code."
        )
    return file
