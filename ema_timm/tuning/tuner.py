"""`ema_timm.tune`: choose on this device the implementation of each EMA layer of a model."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.modes import evaluating
from ema_timm.bench.parity import PARITY_TOLERANCE, Candidate
from ema_timm.bench.timing import Clock
from ema_timm.checkpoints.network import open_network
from ema_timm.errors import UserError
from ema_timm.ops import IMPLEMENTATIONS, ema_attention
from ema_timm.ops.gpu.choice_file import Layer, tuning_key
from ema_timm.ops.gpu.choices import gpu_mode, layout, remember
from ema_timm.tuning.collective import by_first_rank
from ema_timm.tuning.decide import DEFAULT, decide
from ema_timm.tuning.result import TuneResult
from ema_timm.tuning.store import Store

_logger = logging.getLogger(__name__)


def tune(
    model: nn.Module,
    example_input: Any,
    training: bool | None = None,
    retry: bool = False,
    progress: bool = True,
) -> TuneResult:
    """Choose on this device the implementation of each EMA layer of ``model``, and remember it.

    For each distinct layer, `tune` first compares every implementation with the float64 reference,
    then times those that agree. From then on "auto" uses the choice, in this process and in later
    ones. In distributed training all processes must call `tune`; the first one decides for all.
    Experimental: not measured on a GPU yet.

    Args:
        model: Any module with EMA layers; it is left unchanged. If you train under autocast, call
            `tune` under autocast.
        example_input: An input of the model: a tensor, a tuple of arguments or a mapping of named
            ones, with the batch size and image size that you will use.
        training: Choose for forward and backward, and for inference at the same shapes; False
            chooses only for inference, None follows the model's mode.
        retry: Clear the stored choices of these layers, and try disabled implementations again.
        progress: Show a bar (on a terminal).

    Returns:
        The choices and their reasons; ``print`` shows a table.

    Raises:
        UserError: If no EMA layer runs, if the layers run on several devices or on one without
            float64, or if EMA_TIMM_GPU has an unknown value.
        VerificationError: If an implementation broke the device for this process.
    """
    mode = gpu_mode()
    if training is None:
        training = model.training
    layers, devices = find_layers(model, example_input, training)
    device = _only(devices)

    def choose() -> TuneResult:
        """Run in the process that decides."""
        store = Store(tuning_key(device))
        choices = decide(layers, candidates(), store, Clock(device), retry, progress)
        file = str(store.file) if store.writable else None
        return TuneResult(store.key, mode, file, choices, store.records.chosen)

    result = by_first_rank(choose, device)
    remember(device, {**result.stored, **{c.layer: c.chosen for c in result.choices}})
    return result


def tune_by_name(
    name: str,
    img_size: int = 224,
    batch_size: int = 256,
    amp: bool = False,
    channels_last: bool = False,
    device: str = "cpu",
    training: bool = True,
    retry: bool = False,
    progress: bool = True,
) -> TuneResult:
    """Build a network and `tune` it; its weights do not matter.

    Args:
        name: timm name, or a checkpoint folder.
        img_size: Height and width of an image in pixels.
        batch_size: Images in a batch.
        amp: Use bfloat16 mixed precision.
        channels_last: Use channels-last memory format.
        device: Where to run.
        training: See `tune`.
        retry: See `tune`.
        progress: Show a bar (on a terminal).

    Raises:
        UserError: If there is no such network, or the device has too little memory for the batch.
    """
    if img_size < 1 or batch_size < 1:
        raise UserError(
            f"--img-size and --batch-size must be at least 1, got {img_size} and {batch_size}."
        )
    where = torch.device(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = open_network(name, pretrained=False)[0].to(where, memory_format=memory_format)
    try:
        images = torch.randn(batch_size, _channels(model), img_size, img_size, device=where)
        images = images.contiguous(memory_format=memory_format)
        with torch.autocast(where.type, torch.bfloat16, amp):
            return tune(model, images, training, retry, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{where} has too little memory for a batch of {batch_size} at {img_size} px. Use a "
            "smaller --batch-size."
        ) from error


def find_layers(
    model: nn.Module, example_input: Any, training: bool
) -> tuple[dict[Layer, torch.dtype], set[torch.device]]:
    """Run ``model`` once, without gradients and in evaluation mode, and record its EMA layers.

    Args:
        model: Contains EMA layers; it is left unchanged.
        example_input: A tensor, a tuple of arguments, or a mapping of named ones.
        training: Record each layer also with a backward.

    Returns:
        Each distinct layer once, with the dtype of its parameters, and the devices that they ran
        on.

    Raises:
        UserError: If no EMA layer runs, or one runs with an empty batch.
    """
    layers: dict[Layer, torch.dtype] = {}
    devices: set[torch.device] = set()

    def record(module: EmaAttn, arguments: tuple) -> None:
        """Record the shape of one call."""
        x: Tensor = arguments[0]
        if not x.numel():
            raise UserError(f"an example must hold at least one sample, got {tuple(x.shape)}.")
        name = layout(x)
        if name is None or x.dtype not in PARITY_TOLERANCE:
            _logger.warning(
                "No choice is made for %s, %s with strides %s.", tuple(x.shape), x.dtype, x.stride()
            )
            return
        devices.add(x.device)
        shape = *x.shape[:2], module.groups, *x.shape[2:]
        dtype = str(x.dtype).removeprefix("torch.")
        for backward in (True, False) if training else (False,):
            key = Layer(*shape, dtype, name, backward)
            layers.setdefault(key, next(module.parameters()).dtype)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if _has_choice(m)]
    try:
        with evaluating(model), torch.no_grad():
            _call(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        raise UserError(
            f"{type(model).__name__} ran no EMA layer to tune. Give a model with EMA layers that "
            "is not compiled, and an input that reaches them."
        )
    return layers, devices


def candidates() -> Mapping[str, Candidate]:
    """The implementations, the default first."""
    names = sorted(IMPLEMENTATIONS, key=lambda name: name != DEFAULT)
    return {name: partial(ema_attention, impl=name) for name in names}


def _has_choice(module: nn.Module) -> bool:
    """Without cross-spatial learning there is only one implementation."""
    return isinstance(module, EmaAttn) and module.cross_spatial


def _call(model: nn.Module, example_input: Any) -> None:
    if isinstance(example_input, Mapping):
        model(**example_input)
    elif isinstance(example_input, tuple | list):
        model(*example_input)
    else:
        model(example_input)


def _only(devices: set[torch.device]) -> torch.device:
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(
            f"all EMA layers must be on one device, got {names}. Tune each part of the model "
            "separately."
        )
    (device,) = devices
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"tune runs on CUDA (and on the CPU, to try it), got {device}. Other devices always "
            "run the closed form."
        )
    return device


def _channels(model: nn.Module) -> int:
    """The number of channels of an image: that of the network's first convolution."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
