"""A network to look through, by the name that a person has for it, with its images and labels."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models._factory import parse_model_name
from torch import Tensor, nn

from ema_timm.checkpoints.config import read_config
from ema_timm.checkpoints.layout import WEIGHTS
from ema_timm.checkpoints.network import build_network, check_network, load_network
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.errors import UserError
from ema_timm.export import open_onnx
from ema_timm.hub.fetch import fetch


@dataclass(frozen=True)
class Network:
    """A classifier with what belongs to it.

    Attributes:
        name: How a picture names it.
        run: From prepared images (B, C, H, W) to logits (B, classes): a module, or an exported
            file.
        data: Its preprocessing, as timm resolves it.
        labels: Names of the classes, in the order of the outputs.
        one_by_one: Whether it takes one image at a time.
    """

    name: str
    run: nn.Module | Callable[[Tensor], Tensor]
    data: dict
    labels: list[str]
    one_by_one: bool = False


def open_network(source: str, device: torch.device) -> Network:
    """Load a network for inference.

    Args:
        source: A checkpoint folder (``local-dir:FOLDER`` too), a timm name, or
            ``hf-hub:USER/NAME``.
        device: Where to put it.

    Raises:
        UserError: If there is none of that name, or the checkpoint is damaged.
        HubError: If the Hub does not give it, or gives it damaged.
    """
    folder = Path(source.removeprefix("local-dir:"))
    if source.startswith("local-dir:") or folder.is_dir():
        config = check_network(folder)
        model = load_network(folder, config)
        name, args = config["architecture"], config.get("model_args", {})
    else:
        model, name, args = _by_name(source), source.rpartition(":")[2], {}
    data = preprocessing(model, args, {}, use_test_size=True)
    labels = class_labels(model.pretrained_cfg.get("label_names"), model.num_classes)
    return Network(name, model.to(device).eval(), data, labels)


def open_exported(file: Path) -> Network:
    """Open an ONNX file of ``ema-timm export``, with the config.json beside it.

    It gets one image at a time: what an int8 file computes depends on the whole batch, and others'
    files may have a batch of one burnt in.

    Raises:
        UserError: If a file or ONNX Runtime is missing, or the file cannot be read.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}. Write it with: ema-timm export {file.parent}")
    config = read_config(file.parent)
    if find_spec("onnxruntime") is None:
        raise UserError("ONNX files need onnxruntime: pip install 'ema-timm[export]'")
    model = build_network(file.parent, config)
    data = preprocessing(model, config.get("model_args", {}), {}, use_test_size=True)
    labels = class_labels(config.get("label_names"), config["num_classes"])
    try:
        run = open_onnx(file)
        outputs = run(torch.zeros(1, *data["input_size"])).shape
    except Exception as error:  # ONNX Runtime's errors have nothing else in common
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be run: {reason} Export it again.") from error
    if outputs != (1, len(labels)):
        raise UserError(
            f"{file} gives outputs of shape {tuple(outputs)}, and the config.json beside it names "
            f"{len(labels)} classes. Put an exported file into the folder it was made from."
        )
    return Network(file.name, run, data, labels, one_by_one=True)


def class_labels(names: list[str] | None, classes: int) -> list[str]:
    """Names of the classes: the checkpoint's own, else ImageNet's by timm, else numbers."""
    if isinstance(names, list | tuple) and len(names) == classes:
        return list(names)
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(classes)]
    return [str(index) for index in range(classes)]


def _by_name(source: str) -> nn.Module:
    """A network with its weights, by a name of timm or of the Hub."""
    overlay = None
    try:
        kind, model_id = parse_model_name(source)
        if kind == "hf-hub":
            # Compared with the Hub's digest, which timm does not do.
            file = fetch(model_id, WEIGHTS)
            overlay = {"file": str(file), "source": ""} if file else None
        return timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay)
    except (HfHubHTTPError, HFValidationError, OSError, SafetensorError) as error:
        raise UserError(f"cannot load the weights of {source}: {_reason(error)}") from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"there is no checkpoint folder {source}, and timm says: {_reason(error)} Give a "
            "folder, a name from timm.list_pretrained(), or hf-hub:USER/NAME."
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ") + "."
