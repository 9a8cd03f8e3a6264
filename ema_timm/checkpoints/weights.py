"""Weights checked before anyone is given them: whole, finite, and those of their network."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ema_timm.checkpoints.bounds import check_bounds
from ema_timm.errors import UserError, some

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_file(file: Path, expected: dict[str, Tensor]) -> None:
    """Read a safetensors file through, tensor by tensor, and check it against a network's.

    Args:
        file: The weights.
        expected: State dict of the network; its shapes and types count, so it may be on "meta".

    Raises:
        UserError: If the file is missing, damaged, not finite or of another network.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing. Give a folder that ema-timm or timm wrote.")
    check_bounds(file)
    try:
        with safe_open(file, framework="pt") as weights:
            _check_names(file, set(weights.keys()), expected)
            for name in weights.keys():
                _check_tensor(file, name, weights.get_tensor(name), expected[name])
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is damaged: {str(error).rstrip('.')}. Copy the file again from where it was "
            "whole, or write the folder anew."
        ) from error


def load_checked(network: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Load weights that must be whole, finite and of this network.

    Args:
        network: Where they go.
        state: The weights.
        file: Where they came from, for what is said of them.

    Raises:
        UserError: If they are not.
    """
    expected = network.state_dict()
    _check_names(file, set(state), expected)
    for name, tensor in state.items():
        _check_tensor(file, name, tensor, expected[name])
    network.load_state_dict(state)


def _check_names(file: Path, found: set[str], expected: dict[str, Tensor]) -> None:
    """Refuse weights whose names are not those of the network."""
    missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or unknown:
        said = [f"lacks {some(missing, 3)}"] if missing else []
        said += [f"has {some(unknown, 3)}"] if unknown else []
        raise UserError(
            f"{file} is not of the network that config.json names: it {' and '.join(said)}. "
            "Put the config.json and the weights of one checkpoint together."
        )


def _check_tensor(file: Path, name: str, tensor: Tensor, expected: Tensor) -> None:
    """Refuse a tensor of another shape or type than the network's, or that is not finite."""
    if tensor.shape != expected.shape:
        raise UserError(
            f"{file}: {name} is {tuple(tensor.shape)}, and the network of config.json takes "
            f"{tuple(expected.shape)}. Put the config.json and the weights of one checkpoint "
            "together."
        )
    floating = expected.is_floating_point()
    if tensor.dtype not in (_FLOATS if floating else (expected.dtype,)):
        raise UserError(
            f"{file}: {name} is {tensor.dtype}, and the network takes {expected.dtype}. The "
            "header lies or the file was converted wrongly; write the folder anew."
        )
    if floating and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"{file}: {name} holds {bad} NaN or infinite values. Train again with a smaller "
            "learning rate, or take an earlier checkpoint."
        )
