"""How a network's images are prepared, as timm resolves it, for measurements and config.json."""

import math
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ema_timm.errors import UserError

PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""The settings that config.json and results.json keep."""


def check_preprocessing(values: dict, place: str) -> None:
    """Refuse preprocessing that no image can go through. Missing settings are not checked.

    Args:
        values: Settings by timm's names, as in ``pretrained_cfg``.
        place: Where they are, for the error.

    Raises:
        UserError: For the first that is wrong.
    """
    for key, (rule, holds) in _RULES.items():
        value = values.get(key)
        if value is not None and not holds(value):
            raise UserError(f"{place}: {key} must be {rule}, got {value!r}. Correct it.")


def _is_size(value: Any) -> bool:
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(isinstance(length, int) and 1 <= length <= _LONGEST for length in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(_is_number, values)) and len(values) > 0


_LONGEST = 10_000  # two larger images could fill a machine's memory
_SIZE = (f"[channels, height, width], each from 1 to {_LONGEST:,}", _is_size)
_RULES = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "mean": ("numbers, one a channel", _are_numbers),
    "std": ("numbers above 0, one a channel", lambda v: _are_numbers(v) and min(v) > 0),
    "crop_pct": ("a number above 0", lambda v: _is_number(v) and v > 0),
}


def preprocessing(
    model: nn.Module, model_args: dict, overrides: dict, use_test_size: bool = False
) -> dict:
    """How a network's images are prepared for evaluation.

    Args:
        model: The network; its pretrained cfg gives the settings that are not in ``overrides``.
        model_args: Arguments that rebuild it.
        overrides: Settings by timm's names: ``img_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``.
        use_test_size: Use the sizes that timm recommends for testing, if there are some.

    Raises:
        UserError: If no image can go through it.
    """
    check_preprocessing(model.pretrained_cfg, "the network's pretrained_cfg")
    check_preprocessing(overrides, "the settings")
    channels = model_args.get("in_chans", model.pretrained_cfg["input_size"][0])
    for key in ("mean", "std"):
        if len(overrides.get(key) or ()) not in (0, 1, channels):
            raise UserError(
                f"--{key} must be one number, or one for each of the {channels} channels, got "
                f"{len(overrides[key])}."
            )
    settings = {**overrides, "in_chans": channels}
    data = resolve_data_config(settings, model=model, use_test_size=use_test_size)
    data["input_size"] = (channels, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != channels:  # for example a greyscale network with statistics of RGB
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    return data
