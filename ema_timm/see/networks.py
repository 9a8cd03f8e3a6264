"""A classifier by the name that a user gives, with its preprocessing and class labels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ema_timm.checkpoints.network import open_network
from ema_timm.checkpoints.preprocessing import PREPROCESSING
from ema_timm.errors import UserError, require_packages, sentence
from ema_timm.export.description import describe, from_metadata
from ema_timm.export.formats import open_onnx


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
    known = describe(model, model_args)
    return Classifier(name, model.to(device).eval(), _data(known), known["label_names"])


def open_exported(file: Path) -> Classifier:
    """Open an ONNX file of ``ema-timm export``.

    The file describes its preprocessing and classes; for files without a description, the
    config.json of the folder does.

    It gets one image at a time: the outputs of an int8 file depend on the whole batch, and files
    of others may have a fixed batch of one.

    Raises:
        UserError: If a file or ONNX Runtime is missing, or the file cannot be read.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}. Write it with: ema-timm export {file.parent}")
    require_packages(["onnxruntime"], "export", "an ONNX file")
    try:
        run = open_onnx(file)
    except Exception as error:  # ONNX Runtime's errors have nothing else in common
        raise UserError(f"{file} cannot be run: {sentence(error)} Export it again.") from error
    known = from_metadata(run.metadata, file)
    if known is None:
        with torch.device("meta"):  # only its description is used
            known = describe(*open_network(f"local-dir:{file.parent}", pretrained=False))
    data, labels = _data(known), known["label_names"]
    try:
        outputs = run(torch.zeros(1, *data["input_size"])).shape
    except Exception as error:
        raise UserError(f"{file} cannot be run: {sentence(error)} Export it again.") from error
    if outputs != (1, len(labels)):
        raise UserError(
            f"{file} gives outputs of shape {tuple(outputs)}, but {len(labels)} classes are named "
            "in its metadata, or in the config.json of its folder. Export it again."
        )
    return Classifier(file.name, run, data, labels, one_by_one=True)


def _data(known: dict) -> dict:
    """The preprocessing in the description of a network."""
    return {key: known[key] for key in PREPROCESSING}
