"""The state that a run resumes from, and whether it may. It is never published."""

import dataclasses
import io
import lzma
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import torch

from ema_timm.errors import UserError
from ema_timm.files import remove_leftovers, write_whole
from ema_timm.options import option_name
from ema_timm.training.history import History
from ema_timm.training.settings import FinetuneConfig

_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""The errors that reading a damaged state file can raise."""


class RunState:
    """``training/state.pt`` in a run's folder, and the state before it.

    A state is a dictionary of tensors, numbers, strings and containers of them. Its keys:
    ``identity`` and ``config`` of the run, ``base`` of its network, those of
    `TrainStep.state_dict`, the fields of `Position`, ``steps`` in an epoch, ``ranks`` (what differs
    between processes), ``history``, ``best`` and ``extended``.

    Args:
        run: The run's folder, which is also its checkpoint folder.

    Attributes:
        folder: The folder of the states.
        file: The newest state.
        before: The state before it, which `load` reads if the newest is damaged.
        warning: Why `load` did not read the newest state; empty if it did.
    """

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self.folder = self.run / "training"
        self.file, self.before = self.folder / "state.pt", self.folder / "state.previous.pt"
        self.weights = self.run / "model.safetensors"
        self.warning = ""
        self._kept: tuple[list[int], dict] | None = None

    def exists(self) -> bool:
        """Whether there is a state, be it damaged."""
        return self.file.exists() or self.before.exists()

    def check(self, resume: bool) -> None:
        """Check that a run can start or resume in this folder.

        A run writes its state before anything else. So a checkpoint without a state is not the
        work of an interrupted run, and a run that was killed before its first step left nothing
        that could be lost.

        Raises:
            UserError: If the folder holds a run and ``resume`` is off, or a checkpoint without
                a state.
        """
        if not self.exists():
            if self.weights.exists():
                raise UserError(
                    f"{self.run} holds a checkpoint, but no state to continue from. Train on from "
                    f"it with --model local-dir:{self.run} and another --output."
                )
        elif not resume and (self.weights.exists() or not self._is_untrained()):
            raise UserError(
                f"{self.run} already holds a run. Continue it with --resume, or give another "
                "--output."
            )

    def _is_untrained(self) -> bool:
        """Whether no step was made yet, so that another run may start here."""
        try:
            state = self.load()
        except UserError:
            return False
        return state.get("epoch") == 0 and state.get("step") == 0

    def discard(self) -> None:
        """Remove the states of a run that made no step, before another one starts."""
        self.before.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def save(self, state: dict) -> None:
        """Save a state, and keep the one before it."""
        # PyTorch's own writer does not report why a file could not be written.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        write_whole(self.file, lambda path: path.write_bytes(content), previous=self.before)

    def settings(self) -> dict:
        """The settings of the run, without those that no state gives. Keeps what it read."""
        try:
            state = self.load()
        except UserError:
            return {}
        self._kept = self._versions(), state
        return state["config"]

    def forget(self) -> None:
        """Drop what `settings` kept."""
        self._kept = None

    def _versions(self) -> list[int]:
        """When the files were last written."""
        return [file.stat().st_mtime_ns for file in (self.file, self.before) if file.exists()]

    def load(self) -> dict:
        """Read the newest state, or the one before it if the newest is damaged.

        Raises:
            UserError: If there is none, or if both are damaged.
        """
        kept, self._kept = self._kept, None
        if kept and kept[0] == self._versions():
            return kept[1]
        if not self.exists():
            raise UserError(
                f"--resume: {self.run} holds no run. To start one, add --model, --data-dir and "
                "its other settings."
            )
        self.warning = ""
        for file in (self.file, self.before):
            try:
                return _read(file)
            except _DAMAGE:
                wrong = "damaged" if file.exists() else "missing"
                self.warning = f"{file} is {wrong}: using the state before it, {self.before.name}"
        if self.weights.exists():
            remedy = (
                "The weights of its best epoch are intact: train on from them with --model "
                f"local-dir:{self.run} and another --output."
            )
        else:
            remedy = "Start a new run with another --output."
        raise UserError(
            f"cannot resume: {self.file} is damaged, and the state before it cannot be read. "
            f"{remedy}"
        )

    def remove_leftovers(self) -> None:
        """Remove unfinished files that killed processes left in the run's folder."""
        for folder in (self.run, self.folder):
            remove_leftovers(folder)


def _read(file: Path) -> dict:
    with zipfile.ZipFile(file) as archive:  # PyTorch does not verify the checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} in {file} is wrong")
    return torch.load(file, map_location="cpu", weights_only=True)


def identify(
    config: FinetuneConfig, processes: int, data: dict, class_weights: list[float] | None = None
) -> dict:
    """The identity of a run: everything that its outcome depends on.

    Args:
        config: Its settings.
        processes: Number of processes.
        data: Number and fingerprint of its images.
        class_weights: Weights of the classes in its loss.
    """
    arguments = dataclasses.asdict(config)
    return {
        "arguments": {k: v for k, v in arguments.items() if k not in FinetuneConfig.ANYTIME},
        "processes": processes,
        # The number of threads decides how sums are split, and so how they are rounded.
        "threads": torch.get_num_threads(),
        "data": data,
        "class_weights": class_weights,
    }


def extends(state: dict, epochs: int) -> bool:
    """Whether ``epochs`` are more than a finished run has: a new run from its last weights.

    Args:
        state: The run's state.
        epochs: The epochs requested now.
    """
    planned, patience = state["config"]["epochs"], state["config"].get("patience", 0)
    history = History(state["history"], state["best"], state["extended"])
    finished = state["epoch"] == planned or history.stalled(patience)
    return finished and epochs > planned


def check_same_run(saved: dict, identity: dict, extended: bool = False) -> None:
    """Check that a run may continue from a state.

    Args:
        saved: The identity in the state.
        identity: The identity now.
        extended: Whether the run is finished and continues with more epochs.

    Raises:
        UserError: With the first difference that would change the outcome.
    """
    if "threads" not in saved:
        raise UserError(
            "cannot resume: the run was started by a version of ema-timm that augmented images in "
            "another order. Train on from its weights with --model local-dir:FOLDER and another "
            "--output."
        )
    # An older state lacks newer settings. Their defaults keep the old behaviour.
    before = {**dataclasses.asdict(FinetuneConfig()), **saved["arguments"]}
    for name, value in identity["arguments"].items():
        if before[name] != value and not (extended and name == "epochs"):
            raise UserError(
                f"cannot resume: {option_name(name)} is {value!r}, but the run was started with "
                f"{before[name]!r}. Use its settings, or only --resume --output; or start a new "
                "run with another --output."
            )
    if saved.get("class_weights") != identity["class_weights"]:
        raise UserError(
            "cannot resume: the numbers of --class-weights have changed since the run was started. "
            "Restore them, or start a new run with another --output."
        )
    if saved["data"] != identity["data"]:
        raise UserError(
            "cannot resume: the images have changed since the run was started. "
            "Restore them, or start a new run with another --output."
        )


def spread(state: dict, processes: int, steps: int, batches: int) -> dict:
    """The state of a run, made for another number of processes.

    The run continues after the images that it has trained on, rounded down to a step.

    Args:
        state: The state.
        processes: Number of processes now.
        steps: Batches in an epoch of one process now.
        batches: Batches of one optimiser step.
    """
    done, before = state["step"], state["identity"]["processes"]
    step = done * before // processes // batches * batches
    if done == state.get("steps") or step > steps:  # trained, not evaluated
        step = steps
    losses = [each["loss_sum"] for each in state.get("ranks") or [state]]
    mean = sum(losses) / len(losses) / max(done, 1)
    return {
        **state,
        "step": step,
        "loss_sum": mean * step,
        "rng": None,
        "ranks": None,
        "gradients": {},
        "scheduler": None,
    }
