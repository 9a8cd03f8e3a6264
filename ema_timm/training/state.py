"""What a run resumes from, in the run's folder beside the checkpoint; never published."""

from pathlib import Path

import torch

from ema_timm.errors import UserError
from ema_timm.files import make_writable, write_whole


class RunState:
    """``training/state.pt`` of a run's folder.

    Args:
        run: The folder, which is the checkpoint folder too.
    """

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self.file = self.run / "training" / "state.pt"

    def prepare(self, resume: bool) -> None:
        """Make the folder, or refuse it.

        Raises:
            UserError: If it holds a run and ``resume`` is off, holds none and ``resume`` is on,
                or cannot be written.
        """
        if resume and not self.file.is_file():
            raise UserError(
                f"--resume: {self.run} holds no interrupted run ({self.file} is missing). "
                "Start it without --resume."
            )
        if not resume and (self.file.exists() or (self.run / "model.safetensors").exists()):
            raise UserError(
                f"{self.run} holds a run already. Continue it with --resume, or give another "
                "--output."
            )
        make_writable(self.file.parent)

    def save(self, state: dict) -> None:
        """Save tensors, numbers, strings and containers of them."""
        write_whole(self.file, lambda path: torch.save(state, path))

    def reopen(self) -> dict:
        """Read the state of a run that continues.

        Raises:
            UserError: If the folder holds none, or cannot be written, or the file is damaged.
        """
        self.prepare(resume=True)
        return self.load()

    def load(self) -> dict:
        """Read what `save` wrote.

        Raises:
            UserError: If the file is damaged.
        """
        try:
            return torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"cannot resume: {self.file} is damaged. Remove {self.run} and start anew."
            ) from error
