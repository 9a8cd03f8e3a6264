"""`ema_timm.tune` for a network that a person names, as ``ema-timm tune`` is told of it."""

from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from timm.models import is_model
from torch import nn

from ema_timm.checkpoints.network import check_network, load_network
from ema_timm.errors import UserError
from ema_timm.tuning.tune import Tuned, tune


def tune_by_name(
    name: str,
    size: int = 224,
    batch: int = 256,
    amp: bool = False,
    channels_last: bool = False,
    device: str = "cpu",
    training: bool = True,
    retry: bool = False,
    progress: bool = True,
) -> Tuned:
    """Build a network and choose for it; what its weights are does not matter.

    Args:
        name: timm name, or a checkpoint folder.
        size: Height and width of an image in pixels.
        batch: Images in a batch.
        amp: bfloat16 mixed precision.
        channels_last: Memory format.
        device: Where to.
        training: As `ema_timm.tune` takes it.
        retry: As `ema_timm.tune` takes it.
        progress: Show a bar (on a terminal).

    Raises:
        UserError: If there is no such network, or the device's memory does not hold the batch.
    """
    if size < 1 or batch < 1:
        raise UserError(f"--size and --batch must be at least 1, got {size} and {batch}.")
    where = torch.device(device)
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = _build(name).to(where, memory_format=form)
    try:
        images = torch.randn(batch, _channels(model), size, size, device=where)
        images = images.contiguous(memory_format=form)
        with torch.autocast(where.type, torch.bfloat16, amp):
            return tune(model, images, training, retry, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{where} has no memory for a batch of {batch} at {size} px. Give a smaller --batch."
        ) from error


def _build(name: str) -> nn.Module:
    if Path(name).is_dir():
        return load_network(Path(name), check_network(Path(name)))
    if not is_model(name):
        near = get_close_matches(name, timm.list_models("*_ema"), n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else 'See timm.list_models("*_ema").'
        raise UserError(f"{name} is neither a folder nor a model of timm's. {hint}")
    return timm.create_model(name)


def _channels(model: nn.Module) -> int:
    """Of an image: a network's first convolution takes it."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
