"""One choice for all processes of a distributed training, so that all run the same kernels."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from ema_timm.errors import VerificationError, first_line

T = TypeVar("T")


def by_first_rank(decide: Callable[[], T], device: torch.device) -> T:
    """Call ``decide()`` in the first process, and return its result in every process.

    Args:
        decide: Called only in the first process, or in the only one.
        device: The device of this process.

    Raises:
        VerificationError: In the other processes, if the first one failed.
    """
    if not _is_distributed():
        return decide()
    result = failure = None
    if distributed.get_rank() == 0:
        try:
            result = decide()
        except BaseException as error:  # the other processes are waiting
            try:
                _broadcast([None, f"{type(error).__name__}: {first_line(error)}"], device)
            finally:  # a broken GPU cannot send; the first error is the one to show
                raise error
    result, failure = _broadcast([result, failure], device)
    if failure:
        raise VerificationError(f"the first process of this training could not choose: {failure}")
    return result


def _is_distributed() -> bool:
    """Whether this process belongs to a group of several."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def _broadcast(message: list, device: torch.device) -> list:
    # NCCL sends from the current device, which may not be the one of this process yet.
    on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on:
        distributed.broadcast_object_list(message, src=0)
    return message
