"""A network and images -> counted metrics."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import nn
from tqdm import tqdm


class Metrics(NamedTuple):
    """What an evaluation counted.

    Attributes:
        top1: Top-1 accuracy in %.
        top5: Top-5 accuracy in %; None with fewer than six classes, where it says nothing.
        loss: Mean cross-entropy.
        correct: Images whose class was predicted.
        images: Images evaluated.
    """

    top1: float
    top5: float | None
    loss: float
    correct: int
    images: int


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision in ``dtype``, or nothing where that is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    images_here: int | None = None,
    progress: bool = True,
) -> Metrics:
    """Evaluate a classifier; under DDP, over the shards of all processes.

    Args:
        model: Classifier; left in eval mode.
        loader: Yields (images (B, C, H, W), targets (B,)), in a fixed order.
        device: Where to run.
        amp_dtype: Type for autocast, or None.
        channels_last: Memory format of the images.
        images_here: Count only so many images of this process' shard: samplers pad shards to one
            length by repeating images.
        progress: Show a bar (on a terminal).

    Returns:
        Exact counts over all images.
    """
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    sums = torch.zeros(4, dtype=torch.float64)  # correct, in the top 5, loss, images
    classes = 0  # stays so in a process whose shard is empty
    for images, targets in tqdm(
        loader, "validating", disable=None if progress else True, leave=False
    ):
        if images_here is not None:
            left = images_here - int(sums[3])
            images, targets = images[:left], targets[:left]
        count = targets.shape[0]
        if count == 0:
            continue
        images = images.to(device, memory_format=memory_format)
        targets = targets.to(device)
        with autocast(device, amp_dtype):
            logits = model(images)
        logits = logits.float()
        classes = logits.shape[1]
        topk = accuracy(logits, targets, topk=(1, 5))
        hits = [round(float(percent) * count / 100) for percent in topk]
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        sums += torch.tensor([*hits, loss, count], dtype=torch.float64)
    sums = sum_over_processes(sums, device)
    correct, in_top5, loss, images = sums.tolist()
    return Metrics(
        top1=100 * correct / images,
        top5=100 * in_top5 / images if classes > 5 else None,
        loss=loss / images,
        correct=int(correct),
        images=int(images),
    )


def sum_over_processes(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a small float64 vector over the processes of a distributed run."""
    if not torch.distributed.is_initialized():
        return sums
    # NCCL reduces on the device only; MPS has neither float64 nor a process group.
    sums = sums.to(device if device.type == "cuda" else "cpu")
    torch.distributed.all_reduce(sums)
    return sums.cpu()
