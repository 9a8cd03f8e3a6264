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
        loss: Mean cross-entropy.
        correct: Images whose class was predicted.
        images: Images evaluated.
    """

    top1: float
    top5: float | None
    loss: float
    correct: int
    images: int


class Tally:
    """Counts the outputs of a classifier, batch by batch."""

    def __init__(self):
        self._sums = torch.zeros(4, dtype=torch.float64)  # correct, in the top 5, loss, images
        self._classes = 0  # stays 0 in a process whose shard is empty
        self.predicted: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count one batch: (B, classes) and (B,). Ties are broken as in timm's ``accuracy``."""
        self._classes = logits.shape[1]
        best = logits.topk(min(5, self._classes), 1, True, True).indices
        hits = best == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        self._sums += torch.tensor(
            [hits[:, 0].sum().item(), hits.sum().item(), loss, len(targets)], dtype=torch.float64
        )
        self.predicted.append(best[:, 0].cpu())
        self.targets.append(targets.cpu())

    def metrics(self, device: torch.device) -> Metrics:
        """The counts; under DDP, over the shards of all processes."""
        sums = sum_over_processes(self._sums, device)
        correct, in_top5, loss, images = sums.tolist()
        return Metrics(
            top1=100 * correct / images,
            top5=100 * in_top5 / images if self._classes > 5 else None,
            loss=loss / images,
            correct=int(correct),
            images=int(images),
        )

    def per_class(self, classes: int) -> tuple[Tensor, Tensor]:
        """Images and correct ones of each class, in this process."""
        targets, predicted = torch.cat(self.targets), torch.cat(self.predicted)
        images = torch.bincount(targets, minlength=classes)
        return images, torch.bincount(targets[targets == predicted], minlength=classes)

    def confusion(self, classes: int) -> Tensor:
        """Counts of this process by (target, predicted), (classes, classes)."""
        pairs = torch.cat(self.targets) * classes + torch.cat(self.predicted)
        return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def measure(model: nn.Module, loader, device: torch.device, **options) -> Metrics:
    """Evaluate a classifier; under DDP, over the shards of all processes.

    Takes what `outputs` takes. The counts are exact over all images.
    """
    return tally(model, loader, device, **options).metrics(device)


def tally(model: nn.Module, loader, device: torch.device, **options) -> Tally:
    """Count all outputs of a classifier; takes what `outputs` takes."""
    counts = Tally()
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
