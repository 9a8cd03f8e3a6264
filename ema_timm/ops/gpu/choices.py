"""The implementation that "auto" uses for a call on a GPU: EMA_TIMM_GPU, or a choice of `tune`.

This module only looks up. `choice_file` knows the file; `ema_timm.tuning` measures and writes it.
CPU tensors never come here.
"""

import logging
import os
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ema_timm.errors import UserError
from ema_timm.ops.gpu.choice_file import Layer, read_device

_logger = logging.getLogger(__name__)

GPU_MODES = ("auto", "off", "fused")
"""Values of EMA_TIMM_GPU: use the choices; always the closed form; always the fused kernels."""

_chosen: dict[tuple, str] = {}
"""Implementation by `Layer.key`."""
_default: dict[torch.device, str | None] = {}
"""Devices whose choices are in `_chosen`, with the implementation of all other calls."""


def look_up(x: Tensor, groups: int, training: bool) -> str | None:
    """The implementation to use for ``x``; None if neither EMA_TIMM_GPU nor `tune` chose one.

    Args:
        x: Feature map on a GPU, (B, C, H, W).
        groups: G.
        training: Whether a backward follows.

    Raises:
        UserError: If EMA_TIMM_GPU has an unknown value.
    """
    found = _chosen.get((x.device, x.shape, groups, x.dtype, layout(x), training))
    if found is not None:
        return found
    if x.device not in _default:
        remember(x.device, read_device(x.device).chosen if gpu_mode() == "auto" else {})
        return look_up(x, groups, training)
    return _default[x.device]


def layout(x: Tensor) -> str | None:
    """The first of `choice_file.LAYOUTS` that ``x`` has; None if it has neither."""
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else None


def remember(device: torch.device, chosen: Mapping[Layer, str | None]) -> None:
    """Use ``chosen`` on ``device`` from now on, in this process; None removes a choice.

    Raises:
        UserError: If EMA_TIMM_GPU has an unknown value.
    """
    mode = gpu_mode()
    _default[device] = "fused" if mode == "fused" else None
    if mode != "auto":
        return
    for layer, name in chosen.items():
        if name is None:
            _chosen.pop(layer.key(device), None)
        else:
            _chosen[layer.key(device)] = name


def give_up(device: torch.device, reason: str) -> None:
    """Stop using the fused kernels on ``device`` in this process, and warn once."""
    _default[device] = None
    for key in [k for k, name in _chosen.items() if k[0] == device and name == "fused"]:
        del _chosen[key]
    pass_over(reason)


@cache
def pass_over(reason: str) -> None:
    """Warn once that the fused kernels were chosen but cannot run, and why."""
    _logger.warning("EMA attention runs its closed form, not the fused kernels: %s.", reason)


def gpu_mode() -> str:
    """The value of EMA_TIMM_GPU, one of `GPU_MODES`.

    Raises:
        UserError: If it is none of them.
    """
    value = os.environ.get("EMA_TIMM_GPU") or "auto"
    if value not in GPU_MODES:
        raise UserError(
            f"EMA_TIMM_GPU must be one of {', '.join(GPU_MODES)}, got {value!r}. Set it to one of "
            "them, or unset it."
        )
    return value
