"""Read checkpoint files of a training: weights and metadata. No code of a pickle ever runs.

Reads ``model_best.pth.tar`` and ``checkpoint-N.pth.tar`` of timm's train script (with the
``args.yaml`` beside them), plain state dicts, and safetensors files.
"""

import argparse
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from timm.models import is_model
from torch import Tensor

from ema_timm.checkpoints.preprocessing import check_preprocessing
from ema_timm.checkpoints.schema import TRAIN_FIELDS
from ema_timm.checkpoints.state import (
    USUAL_KEYS,
    FoundState,
    find_prefix,
    find_state,
    is_counter,
    without_prefix,
)
from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import UserError, sentence, some
from ema_timm.fields import check_fields, is_kind, load_yaml


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the metadata of their file.

    Attributes:
        file: The file they were read from.
        state: Tensors by name, without the wrappers ``module.`` and ``_orig_mod.``.
        averaged: Whether these are averaged weights (timm's ``--model-ema``).
        architecture: timm's name of the network, or None.
        epoch: Epochs trained, counted from 1, or None.
        arguments: Arguments of timm's train script; empty where unknown.
        notes: Sentences on how the weights were found in the file, for the user.
    """

    file: Path
    state: dict[str, Tensor]
    averaged: bool = False
    architecture: str | None = None
    epoch: int | None = None
    arguments: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def named_as(self, expected: Collection[str]) -> "Checkpoint":
        """The checkpoint with its weights under the names of a network.

        A prefix before all of these names is removed, and so are tensors without that prefix, such
        as the weights of a loss. `notes` says so.

        Args:
            expected: The names in the network's state dict.

        Raises:
            UserError: If the file holds the network several times.
        """
        try:
            prefix = find_prefix(self.state, expected)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error
        outside = [n for n in self.state if not n.startswith(prefix) and n not in expected]
        state = without_prefix(self.state, prefix)
        state = {name: tensor for name, tensor in state.items() if name not in outside}
        notes = removed(prefix)
        notes += [f"did not use {some(outside)}"] if outside else []
        if any(is_counter(name) and name not in state for name in expected):
            notes.append("it has no num_batches_tracked; they count batches and change no output")
        return replace(self, state=state).noted(*notes)

    def noted(self, *notes: str) -> "Checkpoint":
        """The checkpoint with more `notes`, each about its file."""
        return replace(self, notes=(*self.notes, *(f"{self.file}: {note}" for note in notes)))


def read_checkpoint(file: str | Path, averaged: bool | None = None) -> Checkpoint:
    """Read a checkpoint file.

    Args:
        file: ``.safetensors``, or a pickle of tensors, numbers and strings; of Python's classes
            it may hold only ``argparse.Namespace``, which timm's train script saves.
        averaged: Take the averaged weights, or the trained ones. None takes the averaged weights
            of timm's train script if there are some, as timm itself does when it loads the file.

    Raises:
        UserError: If the file is missing or damaged, declares more than it holds, needs to run
            code, or has no such weights.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{file} is a folder. Give a checkpoint file.")
    if not file.is_file():
        raise UserError(f"there is no file {file}. Give a checkpoint file.")
    check_bounds(file)
    content = _load(file)
    try:
        found = find_state(content, averaged)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    arguments = _arguments(file, content)
    architecture = arguments.get("model") or content.get("arch")
    epoch = content.get("epoch")
    return Checkpoint(
        file=file,
        state=found.tensors,
        averaged=found.averaged,
        architecture=architecture if isinstance(architecture, str) else None,
        epoch=epoch + 1 if is_kind(epoch, int) else None,
        arguments=arguments,
    ).noted(*_notes(found))


def removed(prefix: str) -> list[str]:
    """The note on a prefix that was removed from all names; none if it is empty."""
    return [f"removed {prefix} from the beginning of its names"] if prefix else []


def _notes(found: FoundState) -> list[str]:
    """Which entry of the file the weights are, if there was a choice."""
    if found.other:
        this, those = ("averaged", "trained") if found.averaged else ("trained", "averaged")
        option = "--no-use-averaged" if found.averaged else "--use-averaged"
        return [
            f"took its {this} weights ({found.key}); ema-timm evaluate and convert take the "
            f"{those} ones ({found.other}) with {option}"
        ]
    return [] if found.key in ("", *USUAL_KEYS) else [f"took the weights in {found.key}"]


def _load(file: Path) -> dict:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(_refusal(file, str(error))) from error
    except Exception as error:  # a damaged pickle or archive can end in any
        raise UserError(
            f"{file} cannot be read: {sentence(error)} Copy it again, or take another checkpoint."
        ) from error
    return content if isinstance(content, dict) else {}


def _refusal(file: Path, text: str) -> str:
    """Why PyTorch's restricted unpickler stopped, in one line."""
    wanted = re.search(r"GLOBAL ([A-Za-z_][\w.]*)", text)
    if not wanted:
        reason = text.partition("WeightsUnpickler error: ")[2] or text
        return (
            f"{file} is refused: it is not a checkpoint of tensors, numbers and strings "
            f"({reason.strip().splitlines()[0].rstrip('.')}). Copy it again, or take another."
        )
    return (
        f"{file} is refused: loading it would run {wanted[1]}, and a checkpoint needs no code "
        "except argparse.Namespace. If you trust it, save only its state dict: "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
    )


def _arguments(file: Path, content: dict) -> dict:
    """The train script's arguments, from the checkpoint or the args.yaml beside it."""
    given, place, remedy = content.get("args"), file, "Save the weights alone, without args."
    if isinstance(given, argparse.Namespace):
        arguments = vars(given)
    else:
        place, remedy = file.with_name("args.yaml"), "Repair or remove it."
        arguments = _beside(place, remedy)
    check_fields(arguments, TRAIN_FIELDS, place, remedy)
    check_preprocessing(arguments, str(place))
    return dict(arguments)


def _beside(file: Path, remedy: str) -> dict:
    """The content of an args.yaml; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        return load_yaml(file) or {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {sentence(error)} {remedy}") from error


def resolve_architecture(checkpoint: Checkpoint, model: str = "") -> str:
    """The timm name of a checkpoint's network: the given one, else the one in the file.

    Raises:
        UserError: If neither names a network of timm.
    """
    name = model or checkpoint.architecture or ""
    if is_model(name.partition(".")[0]):
        return name.partition(".")[0]
    fault = (
        f"timm has no model {name!r}" if name else f"{checkpoint.file} does not name its network"
    )
    raise UserError(f"{fault}. Give it as --model, such as resnet50_ema (see timm.list_models()).")
