"""`ema_timm.tune`: choose on this device who computes each EMA attention layer of a model."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.modes import evaluating
from ema_timm.bench.parity import TOLERANCE, Candidate
from ema_timm.bench.timing import Clock
from ema_timm.checkpoints.network import open_network
from ema_timm.errors import UserError
from ema_timm.ops import IMPLEMENTATIONS, ema_attention
from ema_timm.ops.gpu import choices
from ema_timm.ops.gpu.choices import Layer, layout
from ema_timm.tuning.collective import by_first_rank
from ema_timm.tuning.decide import BASE, decide
from ema_timm.tuning.outcome import Tuned
from ema_timm.tuning.store import Store


def tune(
    model: nn.Module,
    example_input: Any,
    training: bool | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Tuned:
    """Choose on this device who computes each EMA attention layer of ``model``, and remember it.

    Each implementation is compared with the float64 definition at each distinct layer's shape
    first, then those that agree are timed. "auto" looks the choice up from then on, in this
    process and in later ones. Where PyTorch's processes of one training are joined, all call this
    and the first one decides for all.

    Args:
        model: Any module that holds layers; left as it was. Under autocast, call this under it.
        example_input: What the model takes: a tensor, a tuple of arguments or a mapping of named
            ones, of the batch size and image size that will be used.
        training: Choose for forward and backward, and for inference at the same shapes; False
            chooses for inference alone, None does as the model's mode says.
        retry: Forget what was chosen for these layers, and which candidates ended a process.
        progress: Show a bar (on a terminal).

    Returns:
        The choices and their reasons; ``print`` shows a table.

    Raises:
        UserError: If the model meets no such layer, or meets them on several devices or one that
            has no float64, or EMA_TIMM_GPU says nothing that it can say.
        VerificationError: If a candidate broke the device for this process.
    """
    asked = choices.wish()
    layers, devices = meet(model, example_input, model.training if training is None else training)
    device = _only(devices)

    def choose() -> Tuned:
        """In the process that decides."""
        store = Store(choices.environment(device))
        outcomes = decide(layers, candidates(), store, Clock(device), retry, progress)
        file = str(store.file) if store.kept else None
        return Tuned(store.environment, asked, file, outcomes, store.notes.chosen)

    tuned = by_first_rank(choose, device)
    choices.remember(device, {**tuned.noted, **{o.layer: o.chosen for o in tuned.outcomes}})
    return tuned


def candidates() -> Mapping[str, Candidate]:
    """The implementations, today's first."""
    names = sorted(IMPLEMENTATIONS, key=lambda name: name != BASE)
    return {name: partial(_by, name) for name in names}


def _by(name: str, *layer: Any) -> torch.Tensor:
    return ema_attention(*layer, impl=name)


def _only(devices: set[torch.device]) -> torch.device:
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(f"the layers must be on one device, got {names}. Tune each part alone.")
    (device,) = devices
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"choices are made on CUDA (and on the CPU, to try), got {device}. There the closed "
            "form runs."
        )
    return device


# MERGED: `ema_timm.tune` for a network that a person names, as ``ema-timm tune`` is told of it.
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
    model = open_network(name, pretrained=False)[0].to(where, memory_format=form)
    try:
        images = torch.randn(batch, _channels(model), size, size, device=where)
        images = images.contiguous(memory_format=form)
        with torch.autocast(where.type, torch.bfloat16, amp):
            return tune(model, images, training, retry, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{where} has no memory for a batch of {batch} at {size} px. Give a smaller --batch."
        ) from error


def _channels(model: nn.Module) -> int:
    """Of an image: a network's first convolution takes it."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


# MERGED: Which EMA attention layers a network meets with an input, each distinct one once.
_logger = logging.getLogger(__name__)


def meet(model: nn.Module, example: Any, training: bool) -> tuple[dict[Layer, torch.dtype], set]:
    """Run ``model`` once, without gradients and in evaluation mode, and see what its layers take.

    Args:
        model: Holds EMA attention layers; left as it was.
        example: A tensor, a tuple of arguments, or a mapping of named ones.
        training: Add each layer with a backward too.

    Returns:
        The layers, with the type of their parameters, and the devices that they were met on.

    Raises:
        UserError: If none is met, or one with an empty batch.
    """
    layers: dict[Layer, torch.dtype] = {}
    devices: set[torch.device] = set()

    def look(module: EmaAttn, arguments: tuple) -> None:
        """Note the feature map of one call; its numbers do not matter."""
        x: Tensor = arguments[0]
        if not x.numel():
            raise UserError(f"an example holds at least one sample, got {tuple(x.shape)}.")
        form = layout(x)
        if form is None or x.dtype not in TOLERANCE:
            _logger.warning(
                "Nobody is chosen for %s, %s with strides %s.", tuple(x.shape), x.dtype, x.stride()
            )
            return
        devices.add(x.device)
        dtype, kind = str(x.dtype).removeprefix("torch."), next(module.parameters()).dtype
        batch, channels, height, width = x.shape
        for backward in (True, False) if training else (False,):
            key = Layer(batch, channels, module.groups, height, width, dtype, form, backward)
            layers.setdefault(key, kind)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if _is_chosen_for(m)]
    try:
        with evaluating(model), torch.no_grad():
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        raise UserError(
            f"{type(model).__name__} met no EMA attention layer to choose for. Give a model that "
            "holds some, before torch.compile, and an input that reaches them."
        )
    return layers, devices


def _is_chosen_for(module: nn.Module) -> bool:
    """Without cross-spatial learning there is one implementation."""
    return isinstance(module, EmaAttn) and module.cross_spatial


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, tuple | list):
        model(*example)
    else:
        model(example)
