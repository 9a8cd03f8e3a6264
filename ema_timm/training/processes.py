"""The processes of a run: one, or those that torchrun started."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.utils.distributed import init_distributed_device_so, world_info_from_env

from ema_timm.environment import pick_device


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Args:
        rank: Its number, from 0.
        count: Number of processes.
        device: Its device.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether it is the process that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all other processes."""
        if self.count > 1:
            torch.distributed.barrier()


def is_main() -> bool:
    """Whether this process writes files and prints. Works before `join_processes`."""
    return world_info_from_env()[1] == 0


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in PyTorch within this context; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Process]:
    """Connect the processes of the run within this context.

    Args:
        device: The setting ``device``.

    Raises:
        UserError: If that device is not available.
    """
    world = init_distributed_device_so(device=pick_device(device))
    process = Process(world["global_rank"], world["world_size"], torch.device(world["device"]))
    try:
        yield process
        process.wait()  # the main process may still be writing
    finally:
        if process.count > 1:
            torch.distributed.destroy_process_group()
