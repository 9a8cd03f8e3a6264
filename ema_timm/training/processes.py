"""The processes of a run: one, or those that torchrun started."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so

from ema_timm.environment import pick_device
from ema_timm.errors import HubError, ReportedError, UserError


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Every process must call the methods in the same order.

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

    def gather(self, value: Any) -> list:
        """``value`` of every process, by rank."""
        values = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """``value`` of the main process."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """If one process raises an error in this context, all raise it.

        The process with the lowest rank reports the error; in the others its cause is a
        `ReportedError`. The processes must not communicate within the context.
        """
        error = None
        try:
            yield
        except (UserError, HubError, OSError) as own:
            error = own
        errors = self.gather(error)
        first = next((rank for rank, each in enumerate(errors) if each), None)
        if first is None:
            return
        if error is not None and self.rank == first:
            raise error
        raise errors[first] from ReportedError(f"process {first} of the run reports this error")


class SharedNumber:
    """The largest number that any process sent, seen by all of them at the same call.

    With several processes, a call returns what they sent with the call before. So no process
    waits: the numbers travel while the next step computes. A call costs one all-reduce of one
    number.

    Args:
        process: This process.
    """

    def __init__(self, process: Process):
        self.process, self._sent, self._work = process, None, None

    def __call__(self, number: int) -> int:
        """Send ``number``. Every process must call this equally often.

        Returns:
            With one process, ``number``. With several, the largest number of the call before.
        """
        if self.process.count == 1:
            return number
        if self._work is not None:
            self._work.wait()
            if largest := int(self._sent):
                return largest
        on_gpu = self.process.device.type == "cuda"
        self._sent = torch.tensor(number, device=self.process.device if on_gpu else "cpu")
        largest = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._sent, largest, async_op=True)
        return 0


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
        ConnectionError: If another process has ended.
    """
    try:
        world = init_distributed_device_so(device=pick_device(device))
        process = Process(world["global_rank"], world["world_size"], torch.device(world["device"]))
        yield process
        process.wait()  # the main process may still be writing
    except RuntimeError as error:
        if _is_lost_connection(error):
            raise ConnectionError(
                "lost the connection to another process of the run, which has probably ended. "
                "To continue, start all of them again with --resume"
            ) from error
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether PyTorch raised this because another process does not answer."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
