"""How a network's images are prepared: timm's rule, as every measurement and config.json has it."""

import math
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ema_timm.errors import UserError

PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""What `preprocessing` says that config.json and results.json keep."""


def check_preprocessing(values: dict, said: str) -> None:
    """Refuse preprocessing that no image can go through; what is not there is not asked for.

    Args:
        values: Settings by timm's names, as in ``pretrained_cfg``.
        said: Where they stand.

    Raises:
        UserError: For the first that is wrong.
    """
    for key, (rule, holds) in _RULES.items():
        value = values.get(key)
        if value is not None and not holds(value):
            raise UserError(f"{said}: {key} must be {rule}, got {value!r}. Correct it.")


def _is_size(value: Any) -> bool:
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(isinstance(length, int) and 1 <= length <= _LONGEST for length in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(_is_number, values)) and len(values) > 0


_LONGEST = 10_000  # beyond it two images alone could take a machine's memory
_SIZE = (f"[channels, height, width], each from 1 to {_LONGEST:,}", _is_size)
_RULES = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "mean": ("numbers, one a channel", _are_numbers),
    "std": ("numbers above 0, one a channel", lambda v: _are_numbers(v) and min(v) > 0),
    "crop_pct": ("a number above 0", lambda v: _is_number(v) and v > 0),
}


def preprocessing(
    model: nn.Module, model_args: dict, told: dict, use_test_size: bool = False
) -> dict:
    """How a network's images are prepared for evaluation.

    Args:
        model: The network; its pretrained cfg says what is not told.
        model_args: Arguments that rebuild it.
        told: Settings by timm's names: ``img_size``, ``crop_pct``, ``interpolation``, ….
        use_test_size: Take the sizes that timm recommends for testing, where there are some.

    Raises:
        UserError: If no image can go through it.
    """
    check_preprocessing(model.pretrained_cfg, "the network's pretrained_cfg")
    channels = model_args.get("in_chans", model.pretrained_cfg["input_size"][0])
    told = {**told, "in_chans": channels}
    data = resolve_data_config(told, model=model, use_test_size=use_test_size)
    data["input_size"] = (channels, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != channels:  # statistics of RGB, and a network for greyscale, say
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    return data
