"""Several processes of one training, one choice: else ranks would run different kernels."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from ema_timm.errors import VerificationError, first_line

T = TypeVar("T")


def by_first_rank(decide: Callable[[], T], device: torch.device) -> T:
    """What ``decide()`` gives in the first process, in every process.

    Args:
        decide: Called in the first process alone, or in the only one.
        device: Of this process.

    Raises:
        VerificationError: In the other processes, where the first one failed.
    """
    if not _is_several():
        return decide()
    outcome = failure = None
    if distributed.get_rank() == 0:
        try:
            outcome = decide()
        except BaseException as error:  # the others wait, and must hear of it
            try:
                _broadcast([None, f"{type(error).__name__}: {first_line(error)}"], device)
            finally:  # a broken GPU does not send either; what broke it is what matters
                raise error
    outcome, failure = _broadcast([outcome, failure], device)
    if failure:
        raise VerificationError(f"the first process of this training could not choose: {failure}")
    return outcome


def _is_several() -> bool:
    """Whether this process belongs to a group of several."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def _broadcast(message: list, device: torch.device) -> list:
    # NCCL sends from the current device, which need not be this process's own yet.
    on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on:
        distributed.broadcast_object_list(message, src=0)
    return message
