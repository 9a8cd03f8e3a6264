"""The network that is exported, and the inputs of several sizes that it must take."""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import Tensor, nn

from ema_timm.errors import UserError, first_line


def load(folder: str | Path, **options) -> nn.Module:
    """The network of a checkpoint folder, for inference.

    Args:
        folder: A checkpoint in timm's format.
        options: What timm makes the network with, such as ``scriptable=True``.

    Raises:
        UserError: If the folder holds no checkpoint that timm can load.
    """
    missing = [n for n in ("config.json", "model.safetensors") if not (Path(folder) / n).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no checkpoint in timm's format: {', '.join(missing)} is missing. Give "
            "the --output of ema-timm finetune, or a folder of timm's save_for_hf."
        )
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    except (RuntimeError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"cannot load {folder}: {first_line(error)}") from error


def check_inputs(model: nn.Module) -> list[Tensor]:
    """Inputs of three sizes, the network's own first; the last is the exporters' example."""
    channels, height, width = resolve_data_config(model=model)["input_size"]
    sizes = [
        (1, channels, height, width),
        (3, channels, height + 32, width),
        (2, channels, height // 2 + 16, width // 2 + 25),
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def require_free_sizes(model: nn.Module, inputs: list[Tensor]) -> None:
    """See that the network itself takes every input.

    Raises:
        UserError: If not.
    """
    for x in inputs:
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"export leaves the image size free, and this network does not take "
                f"{x.shape[2]}x{x.shape[3]}: {first_line(error)}"
            ) from error
