"""The loss of a run, with mixup and class weights."""

import math
from pathlib import Path

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ema_timm.data.image_folder import LabelledImages
from ema_timm.errors import UserError, some
from ema_timm.fields import load_json

BALANCED = "balanced"


def mixup_and_loss(
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Mixup | None, nn.Module]:
    """Mixup, or None, and the training loss that goes with it.

    Args:
        num_classes: Number of classes.
        mixup: Mixup alpha; 0 turns it off.
        cutmix: CutMix alpha; 0 turns it off.
        smoothing: Label smoothing.
        class_weights: Weights of the classes, (num_classes,). timm's losses do not support them,
            so PyTorch's loss, which is the same function, replaces them.
    """
    if mixup or cutmix:
        mixer = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        if class_weights is not None:
            return mixer, nn.CrossEntropyLoss(class_weights)
        return mixer, SoftTargetCrossEntropy()
    if class_weights is not None:
        return None, nn.CrossEntropyLoss(class_weights, label_smoothing=smoothing)
    if smoothing:
        return None, LabelSmoothingCrossEntropy(smoothing)
    return None, nn.CrossEntropyLoss()


def read_class_weights(option: str, images: LabelledImages) -> list[float] | None:
    """The weight of each class of ``images`` in the loss, in their order.

    Args:
        option: Value of ``--class-weights``. "balanced" gives a class with n of N images in K
            classes the weight N / (K n), so that the mean over the images is 1. Otherwise a JSON
            file with one number for each class name. Empty gives None.
        images: The training images.

    Raises:
        UserError: If the file does not give each class, and no other, a number above 0.
    """
    if not option:
        return None
    if option == BALANCED:
        counts = images.class_counts()
        return [sum(counts) / (len(counts) * count) for count in counts]
    weights, names = _read_object(Path(option)), images.class_names
    if unlike := sorted(set(weights) ^ set(names)):
        raise UserError(
            f"--class-weights {option} must name each class of the images once; only one of the "
            f"two has {some(unlike)}. Correct the file."
        )
    for name in names:
        number = weights[name]
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(
                f"--class-weights {option}: {name!r} has {number!r}, which is not a number."
            )
        if not (number > 0 and math.isfinite(number)):
            raise UserError(
                f"--class-weights {option}: {name!r} has {number}. Give a number above 0."
            )
    return [float(weights[name]) for name in names]


def _read_object(file: Path) -> dict:
    try:
        content = load_json(file, "utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--class-weights must be {BALANCED} or a JSON file; cannot read {file}: "
            f"{error.strerror}."
        ) from error
    except ValueError as error:
        raise UserError(f"--class-weights: {file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f'--class-weights: {file} must be an object such as {{"daisy": 1, "tulip": 2.5}}.'
        )
    return content
