"""How a network's images are prepared, as timm resolves it, for measurements and config.json."""

import reprlib
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ema_timm.checkpoints.schema import INTERPOLATIONS
from ema_timm.errors import UserError
from ema_timm.fields import is_kind

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
            got = reprlib.repr(value)
            raise UserError(f"{place}: {key} must be {rule}, got {got}. Correct it.")


def _is_size(value: Any) -> bool:
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(is_kind(length, int) and 1 <= length <= _LONGEST for length in value)


def _are_numbers(values: Any) -> bool:
    numbers = isinstance(values, list | tuple) and len(values) > 0
    return numbers and all(is_kind(value, float) for value in values)


def _is_filter(value: Any) -> bool:
    # timm's scripts write "" for the network's own.
    return isinstance(value, str) and (not value or value in INTERPOLATIONS)


_LONGEST = 10_000  # two larger images could fill a machine's memory
_CROP_MODES = ("center", "squash", "border")
_FRACTION = ("a number above 0", lambda v: is_kind(v, float) and v > 0)
_SIZE = (f"[channels, height, width], each from 1 to {_LONGEST:,}", _is_size)
_RULES = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "mean": ("numbers, one a channel", _are_numbers),
    "std": ("numbers above 0, one a channel", lambda v: _are_numbers(v) and min(v) > 0),
    **{key: _FRACTION for key in ("crop_pct", "test_crop_pct")},
    "interpolation": (f"one of {', '.join(INTERPOLATIONS)}", _is_filter),
    "crop_mode": (f"one of {', '.join(_CROP_MODES)}", lambda v: v in _CROP_MODES),
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
