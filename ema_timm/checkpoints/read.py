"""Read checkpoint files of a training: weights and metadata. No code of a pickle ever runs.

Reads ``model_best.pth.tar`` and ``checkpoint-N.pth.tar`` of timm's train script (with the
``args.yaml`` beside them), plain state dicts, and safetensors files.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml
from safetensors.torch import load_file
from timm.models import is_model
from torch import Tensor

from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import UserError, sentence

# As timm itself looks for them.
_WEIGHTS = ("state_dict", "model")
_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and compile


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the metadata of their file.

    Attributes:
        file: The file they were read from.
        state: Tensors by name, without the wrappers ``module.`` and ``_orig_mod.``.
        averaged: Whether these are the averaged weights (timm's ``--model-ema``).
        architecture: timm's name of the network, or None.
        epoch: Epochs trained, counted from 1, or None.
        arguments: Arguments of timm's train script; empty where unknown.
    """

    file: Path
    state: dict[str, Tensor]
    averaged: bool = False
    architecture: str | None = None
    epoch: int | None = None
    arguments: dict = field(default_factory=dict)


def read_checkpoint(file: str | Path, averaged: bool = False) -> Checkpoint:
    """Read a checkpoint file.

    Args:
        file: ``.safetensors``, or a pickle of tensors, numbers and strings; of Python's classes
            it may hold only ``argparse.Namespace``, which timm's train script saves.
        averaged: Take the averaged weights instead of the trained ones.

    Raises:
        UserError: If the file is missing or damaged, declares more than it holds, needs to run
            code, or has no such weights.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"there is no file {file}. Give a checkpoint file or folder.")
    check_bounds(file)
    content = _load(file)
    try:
        state = unwrap(content, averaged)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    arguments = _arguments(file, content)
    architecture = arguments.get("model") or content.get("arch")
    epoch = content.get("epoch")
    return Checkpoint(
        file=file,
        state=state,
        averaged=averaged,
        architecture=architecture if isinstance(architecture, str) else None,
        epoch=epoch + 1 if isinstance(epoch, int) else None,
        arguments=arguments,
    )


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


def unwrap(content: Mapping, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, without ``module.`` and ``_orig_mod.``.

    Args:
        content: A state dict, or a mapping that holds one as timm's checkpoints do.
        averaged: Take the averaged weights instead of the trained ones.

    Raises:
        UserError: If there is none.
    """
    keys = _AVERAGED if averaged else _WEIGHTS
    state = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)
    if state is None and averaged:
        raise UserError(
            "it has no averaged weights. Train with timm's --model-ema, or leave out "
            "--use-averaged."
        )
    state = content if state is None else state
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            "it has no state dict, a mapping of names to tensors. Save model.state_dict(), or give "
            "a checkpoint of timm's train script."
        )
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def _arguments(file: Path, content: dict) -> dict:
    """The train script's arguments, from the checkpoint or the args.yaml beside it."""
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        return dict(vars(arguments))
    beside = file.with_name("args.yaml")
    if not beside.is_file():
        return {}
    try:
        arguments = yaml.safe_load(beside.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{beside} cannot be read: {sentence(error)} Repair or remove it."
        ) from error
    return arguments if isinstance(arguments, dict) else {}


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
