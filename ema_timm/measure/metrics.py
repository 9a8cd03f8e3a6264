"""Metrics of a classifier on images."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm


class Metrics(NamedTuple):
    """The metrics of an evaluation.

    Attributes:
        top1: Top-1 accuracy in %.
        top5: Top-5 accuracy in %; None with fewer than six classes.
        balanced_accuracy: Mean over the classes of the accuracy on their images, in %. Classes
            without images are left out.
        loss: Mean cross-entropy.
        correct: Images whose class was predicted.
        images: Images evaluated.
    """

    top1: float
    top5: float | None
    balanced_accuracy: float
    loss: float
    correct: int
    images: int


class Tally:
    """Counts the outputs of a classifier, batch by batch.

    Args:
        classes: Number of its outputs.
    """

    def __init__(self, classes: int):
        self._classes = classes
        self._sums = torch.zeros(2, dtype=torch.float64)  # in the top 5, loss
        self.predicted: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count one batch: (B, classes) and (B,). Ties are broken as in timm's ``accuracy``."""
        best = logits.topk(min(5, self._classes), 1, True, True).indices
        in_top5 = (best == targets[:, None]).sum().item()
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        self._sums += torch.tensor([in_top5, loss], dtype=torch.float64)
        self.predicted.append(best[:, 0].cpu())
        self.targets.append(targets.cpu())

    def metrics(self, device: torch.device) -> Metrics:
        """The counts; under DDP, over the shards of all processes."""
        counts = torch.stack(self.per_class()).flatten().double()
        sums = sum_over_processes(torch.cat([self._sums, counts]), device)
        in_top5, loss = sums[:2].tolist()
        images, correct = sums[2:].view(2, self._classes)
        seen, total, right = images > 0, int(images.sum()), int(correct.sum())
        return Metrics(
            top1=100 * right / total,
            top5=100 * in_top5 / total if self._classes > 5 else None,
            balanced_accuracy=100 * float((correct[seen] / images[seen]).mean()),
            loss=loss / total,
            correct=right,
            images=total,
        )

    def per_class(self) -> tuple[Tensor, Tensor]:
        """Images and correct ones of each class, in this process."""
        targets, predicted = self._joined()
        images = torch.bincount(targets, minlength=self._classes)
        return images, torch.bincount(targets[targets == predicted], minlength=self._classes)

    def confusion(self) -> Tensor:
        """Counts of this process by (target, predicted), (classes, classes)."""
        targets, predicted = self._joined()
        pairs = torch.bincount(targets * self._classes + predicted, minlength=self._classes**2)
        return pairs.view(self._classes, self._classes)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Targets and predictions of all batches."""
        none = torch.zeros(0, dtype=torch.long)  # the shard of a process may be empty
        return torch.cat([none, *self.targets]), torch.cat([none, *self.predicted])


def measure(model: nn.Module, loader, device: torch.device, **options) -> Metrics:
    """Evaluate a classifier; under DDP, over the shards of all processes.

    Takes what `outputs` takes. The counts are exact over all images.
    """
    return tally(model, loader, device, **options).metrics(device)


def tally(model: nn.Module, loader, device: torch.device, **options) -> Tally:
    """Count all outputs of a classifier; takes what `outputs` takes."""
    counts = Tally(model.num_classes)
    for logits, targets in outputs(model, loader, device, **options):
        counts.add(logits, targets)
    return counts


@torch.inference_mode()
def outputs(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    images_here: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a classifier over a loader.

    Args:
        model: Classifier; left in eval mode.
        loader: Yields (images (B, C, H, W), targets (B,)), in a fixed order.
        device: Where to run.
        amp_dtype: Type for autocast, or None.
        channels_last: Memory format of the images.
        images_here: Number of images in this process' shard: samplers repeat images to pad all
            shards to one length, and those are not used.
        progress: Show a bar (on a terminal).

    Yields:
        Logits (B, classes) in float32 and targets (B,), on ``device``.
    """
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    seen = 0
    for images, targets in tqdm(
        loader, "validating", disable=None if progress else True, leave=False
    ):
        if images_here is not None:
            images, targets = images[: images_here - seen], targets[: images_here - seen]
        if targets.shape[0] == 0:
            continue
        seen += targets.shape[0]
        images = images.to(device, memory_format=memory_format)
        with autocast(device, amp_dtype):
            logits = model(images)
        yield logits.float(), targets.to(device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision in ``dtype``, or nothing if that is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def sum_over_processes(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a small float64 vector over the processes of a distributed run."""
    if not torch.distributed.is_initialized():
        return sums
    # NCCL reduces on the device only; MPS has neither float64 nor a process group.
    sums = sums.to(device if device.type == "cuda" else "cpu")
    torch.distributed.all_reduce(sums)
    return sums.cpu()
