"""What a run minimises: the loss, and the mixing of images that goes with it."""

import json
import math
from pathlib import Path

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ema_timm.data.image_folder import LabelledImages as Dataset
from ema_timm.errors import UserError, some
from ema_timm.training.settings import FinetuneConfig


def mixup_and_loss(
    config: FinetuneConfig, num_classes: int, class_weights: Tensor | None = None
) -> tuple[Mixup | None, nn.Module]:
    """Mixup, or None, and the training loss that goes with it.

    Args:
        config: The run's settings.
        num_classes: Classes.
        class_weights: Weights of the classes, (num_classes,). timm's losses take none, PyTorch's
            is the same function.
    """
    if config.mixup or config.cutmix:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
        if class_weights is not None:
            return mixup, nn.CrossEntropyLoss(class_weights)
        return mixup, SoftTargetCrossEntropy()
    if class_weights is not None:
        return None, nn.CrossEntropyLoss(class_weights, label_smoothing=config.smoothing)
    if config.smoothing:
        return None, LabelSmoothingCrossEntropy(config.smoothing)
    return None, nn.CrossEntropyLoss()


# MERGED: Weights of the classes in the loss: by how rare they are, or as somebody says.
BALANCED = "balanced"


def class_weights(given: str, images: Dataset) -> list[float] | None:
    """The weights of the classes of ``images``, in their order.

    Args:
        given: "balanced", which gives a class of n images of N in K classes N / (K n), so that the
            mean over the images is 1; or a JSON file, an object of class names and numbers. Empty
            gives None.
        images: The images to train on.

    Raises:
        UserError: If the file does not give every class a number above 0, and those alone.
    """
    if not given:
        return None
    if given == BALANCED:
        counts = images.class_counts()
        return [sum(counts) / (len(counts) * count) for count in counts]
    weights, names = _read(Path(given)), images.class_names
    unlike = sorted(set(weights) ^ set(names))
    if unlike:
        raise UserError(
            f"--class-weights {given} must name the classes of the images, each once: "
            f"{some(unlike)} stand(s) on one side alone. Correct the file."
        )
    for name in names:
        number = weights[name]
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(
                f"--class-weights {given}: {name!r} has {number!r}, which is no number."
            )
        if not (number > 0 and math.isfinite(number)):
            raise UserError(
                f"--class-weights {given}: {name!r} has {number}; give a number above 0."
            )
    return [float(weights[name]) for name in names]


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"--class-weights takes {BALANCED} or a JSON file; {file} cannot be read: "
            f"{error.strerror}."
        ) from error
    except ValueError as error:
        raise UserError(f"--class-weights: {file} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f'--class-weights: {file} must be an object such as {{"daisy": 1, "tulip": 2.5}}.'
        )
    return content
