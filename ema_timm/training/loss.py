"""What a run minimises: the loss, and the mixing of images that goes with it."""

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

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
