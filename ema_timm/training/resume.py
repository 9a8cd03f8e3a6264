"""What a run resumes from, in the run's folder beside the checkpoint; never published."""

import dataclasses
import io
import zipfile
from pathlib import Path

import torch

from ema_timm.errors import UserError
from ema_timm.files import remove_leftovers, write_whole
from ema_timm.training.history import History
from ema_timm.training.settings import FinetuneConfig


class RunState:
    """``training/state.pt`` of a run's folder, and the state before it.

    Args:
        run: The folder, which is the checkpoint folder too.

    Attributes:
        folder: What holds the states.
        file: The newest state.
        before: The one before, which is gone on from where the newest is damaged.
        trouble: What was wrong with the newest when `load` took the one before; else empty.
    """

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self.folder = self.run / "training"
        self.file, self.before = self.folder / "state.pt", self.folder / "state.previous.pt"
        self.weights = self.run / "model.safetensors"
        self.trouble = ""

    def check(self, resume: bool) -> None:
        """Refuse a folder that does not suit.

        A state is there before anything else of a run. So a checkpoint without one is no run's,
        and a run that is killed before its first epoch ends leaves nothing that could be lost.

        Raises:
            UserError: If it holds a run or a checkpoint and ``resume`` is off, or holds no run
                and ``resume`` is on.
        """
        if not self.file.exists() and not self.before.exists():
            if self.weights.exists():
                raise UserError(
                    f"{self.run} holds a checkpoint, and no state to continue from. Train on from "
                    f"it with --model local-dir:{self.run} and another --output."
                )
            if resume:
                raise UserError(
                    f"--resume: {self.run} holds no interrupted run ({self.file} is missing). "
                    "Start it without --resume."
                )
        elif not resume and (self.weights.exists() or not self._only_begun()):
            raise UserError(
                f"{self.run} holds a run already. Continue it with --resume, or give another "
                "--output."
            )

    def _only_begun(self) -> bool:
        """Whether no step was made yet, so that the run may as well start anew."""
        try:
            state = self.load()
        except UserError:
            return False
        return state.get("epoch") == 0 and state.get("step") == 0

    def discard(self) -> None:
        """Remove the states of a run that had only begun, for one that starts."""
        self.before.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def save(self, state: dict) -> None:
        """Save tensors, numbers, strings and containers of them, keeping the state before."""
        content = _serialized(state)
        write_whole(self.file, lambda path: path.write_bytes(content), previous=self.before)

    def load(self) -> dict:
        """Read what was saved last, or before that if the last is damaged.

        Raises:
            UserError: If both are damaged.
        """
        self.trouble = ""
        for file in (self.file, self.before):
            try:
                return _read(file)
            except Exception:
                wrong = "damaged" if file.exists() else "missing"
                self.trouble = (
                    f"{file} is {wrong}: going on from the state before, {self.before.name}"
                )
        if self.weights.exists():
            remedy = (
                "The weights of its best epoch are kept: train on from them with --model "
                f"local-dir:{self.run} and another --output."
            )
        else:
            remedy = "Start anew with another --output."
        raise UserError(
            f"cannot resume: {self.file} is damaged, and there is no whole one before it. {remedy}"
        )

    def remove_leftovers(self) -> None:
        """Remove what killed processes were just writing into the run's folder."""
        for folder in (self.run, self.folder):
            remove_leftovers(folder)


def _serialized(state: dict) -> memoryview:
    """The bytes of a state file.

    Not written to the file by PyTorch: its writer does not say what kept it from writing.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _read(file: Path) -> dict:
    with zipfile.ZipFile(file) as archive:  # PyTorch does not compare the checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in {file} is not what was written")
    return torch.load(file, map_location="cpu", weights_only=True)


# MERGED: What makes a run this run, and no other: all that its outcome depends on.
def identify(
    config: FinetuneConfig, processes: int, data: dict, class_weights: list[float] | None = None
) -> dict:
    """The identity of a run.

    Args:
        config: Its settings.
        processes: How many it runs on.
        data: What identifies its images.
        class_weights: Weights of the classes in its loss.
    """
    arguments = dataclasses.asdict(config)
    return {
        "arguments": {k: v for k, v in arguments.items() if k not in FinetuneConfig.ANYTIME},
        "processes": processes,
        # How a sum is split among threads says how it is rounded.
        "threads": torch.get_num_threads(),
        "data": data,
        "class_weights": class_weights,
    }


def extends(state: dict, config: FinetuneConfig) -> bool:
    """Whether settings ask for more epochs of a run that is finished: a new run from its weights.

    Args:
        state: The run's state.
        config: The settings.
    """
    wanted, patience = state["config"]["epochs"], state["config"].get("patience", 0)
    history = History(state["history"], state["best"], state["extended"])
    finished = state["epoch"] == wanted or history.stalled(patience)
    return finished and config.epochs > wanted


def check_same_run(saved: dict, identity: dict, extended: bool = False) -> None:
    """Refuse to continue a run of identity ``saved`` as one of another outcome.

    Args:
        saved: The identity in the state.
        identity: What it is to be.
        extended: More epochs are asked for, as a new run.

    Raises:
        UserError: With the first difference.
    """
    if "threads" not in saved:
        raise UserError(
            "cannot resume: the run was started by an ema-timm that augmented images in another "
            "order. Train on from its weights with --model local-dir:FOLDER and another --output."
        )
    # A setting that is younger than the run was, in effect, what it is where nothing is said.
    before = {**dataclasses.asdict(FinetuneConfig()), **saved["arguments"]}
    for name, value in identity["arguments"].items():
        if before[name] != value and not (extended and name == "epochs"):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"cannot resume: {option} is {value!r} and the run was started with "
                f"{before[name]!r}. Leave it out, or start anew with another --output."
            )
    if saved.get("class_weights") != identity["class_weights"]:
        raise UserError(
            "cannot resume: --class-weights holds other numbers than those the run was started "
            "with. Restore them, or start anew with another --output."
        )
    if saved["processes"] != identity["processes"]:
        raise UserError(
            f"cannot resume on {identity['processes']} process(es): the run was started on "
            f"{saved['processes']}."
        )
    if saved["data"] != identity["data"]:
        raise UserError(
            "cannot resume: the images in --data-dir are not those the run was started on. "
            "Restore them, or start anew with another --output."
        )
