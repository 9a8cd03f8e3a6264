"""What a run minimises: the loss, and the mixing of images that goes with it."""

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ema_timm.training.settings import FinetuneConfig


def mixup_and_loss(config: FinetuneConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup, or None, and the training loss that goes with it."""
    if config.mixup or config.cutmix:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
        return mixup, SoftTargetCrossEntropy()
    if config.smoothing:
        return None, LabelSmoothingCrossEntropy(config.smoothing)
    return None, nn.CrossEntropyLoss()
