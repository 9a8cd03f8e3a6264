"""Where a command runs."""

import torch

from ema_timm.errors import UserError, first_line


def pick_device(name: str) -> str:
    """The device that ``auto`` stands for: CUDA, then MPS, then the CPU.

    Raises:
        UserError: If the named device is not at hand.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not usable here: {first_line(error)} Use --device auto or cpu."
        ) from error
    return name
