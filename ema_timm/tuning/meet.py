"""Which EMA attention layers a network meets with an input, each distinct one once."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.modes import evaluating
from ema_timm.bench.parity import TOLERANCE
from ema_timm.errors import UserError
from ema_timm.ops.choices import Layer, layout

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
