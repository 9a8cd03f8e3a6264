"""A classifier by the name that a user gives, with its preprocessing and class labels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ema_timm.checkpoints.network import open_network
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.errors import UserError, require_packages, sentence
from ema_timm.export import open_onnx


@dataclass(frozen=True)
class Classifier:
    """A classifier with its preprocessing and class labels.

    Attributes:
        name: What a figure calls it.
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

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, (B, classes), for prepared images (B, C, H, W)."""
        return self.run(images).float().softmax(-1)


def open_classifier(source: str, device: torch.device) -> Classifier:
    """Load a classifier for inference; takes and raises what `open_network` does.

    Args:
        source: A checkpoint folder, a timm name or ``hf-hub:USER/NAME``.
        device: Where to put it.
    """
    model, model_args = open_network(source)
    local = source.startswith("local-dir:") or Path(source).is_dir()
    name = model.pretrained_cfg["architecture"] if local else source.rpartition(":")[2]
    data, labels = _described(model, model_args)
    return Classifier(name, model.to(device).eval(), data, labels)


def open_exported(file: Path) -> Classifier:
    """Open an ONNX file of ``ema-timm export``, with the config.json of its folder.

    It gets one image at a time: the outputs of an int8 file depend on the whole batch, and files
    of others may have a fixed batch of one.

    Raises:
        UserError: If a file or ONNX Runtime is missing, or the file cannot be read.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}. Write it with: ema-timm export {file.parent}")
    require_packages(["onnxruntime"], "export", "an ONNX file")
    with torch.device("meta"):  # only its description is used
        data, labels = _described(*open_network(f"local-dir:{file.parent}", pretrained=False))
    try:
        run = open_onnx(file)
        outputs = run(torch.zeros(1, *data["input_size"])).shape
    except Exception as error:  # ONNX Runtime's errors have nothing else in common
        raise UserError(f"{file} cannot be run: {sentence(error)} Export it again.") from error
    if outputs != (1, len(labels)):
        raise UserError(
            f"{file} gives outputs of shape {tuple(outputs)}, but the config.json of its folder "
            f"names {len(labels)} classes. Put an exported file into the folder it was made from."
        )
    return Classifier(file.name, run, data, labels, one_by_one=True)


def _described(model: nn.Module, model_args: dict) -> tuple[dict, list[str]]:
    """Preprocessing and class labels of a network."""
    data = preprocessing(model, model_args, {}, use_test_size=True)
    return data, class_labels(model.pretrained_cfg.get("label_names"), model.num_classes)


def class_labels(names: list[str] | None, classes: int) -> list[str]:
    """Names of the classes: the checkpoint's own, else ImageNet's by timm, else numbers."""
    if isinstance(names, list | tuple) and len(names) == classes:
        return list(names)
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(classes)]
    return [str(index) for index in range(classes)]
