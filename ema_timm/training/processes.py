"""The processes of a run: one alone, or those that torchrun started."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.utils.distributed import init_distributed_device_so, world_info_from_env

from ema_timm.environment import pick_device


@dataclass(frozen=True)
class Process:
    """This process among those of its run.

    Args:
        rank: Its number, from 0.
        count: How many there are.
        device: Where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has come as far."""
        if self.count > 1:
            torch.distributed.barrier()


def is_main() -> bool:
    """Whether this is the process that writes and speaks, before they have joined."""
    return world_info_from_env()[1] == 0


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Within this context PyTorch computes on ``count`` threads; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Process]:
    """Within this context the processes of the run can talk to each other.

    Args:
        device: As the settings name it.

    Raises:
        UserError: If that device is not at hand.
    """
    world = init_distributed_device_so(device=pick_device(device))
    process = Process(world["global_rank"], world["world_size"], torch.device(world["device"]))
    try:
        yield process
        process.wait()  # leave together: the main process may still be writing
    finally:
        if process.count > 1:
            torch.distributed.destroy_process_group()
