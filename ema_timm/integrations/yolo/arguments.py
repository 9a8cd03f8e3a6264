"""What the arguments of a row ``[-1, 1, EmaAttn, [...]]`` of a YOLO model YAML mean.

YOLO's builders know the width of the row before, but tell it only to their own layers. `builder`
reads it from the builder that calls, so that the rows that people paste, ``[8]`` and ``[]``, build
at every scale.

- ``[]``: at most 32 groups; ``[8]``: at most 8.
- ``[{groups: 64, gain: 2}]``: by keyword, and any number of groups. The output is multiplied by
  ``gain``.
- ``[c2]``, ``[c2, 8]``, ``[c2, {gain: 2}]``: the same. A first number that is the width of the row
  before is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import FrameType
from typing import Any

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.integrations.yolo.rows import NAME

REMEDY = f"Write [-1, 1, {NAME}, []], or [-1, 1, {NAME}, [8]] for 8 groups"

_RULE = (
    f"the width comes from the row before, and one number, at most {DEFAULT_GROUPS}, is the number "
    "of groups (more: {groups: 64})"
)
_OLD_GAIN = 2  # the third number of the rows that ema-timm 0.2.0 wrote


@dataclass(frozen=True)
class RowArguments:
    """The arguments of one row.

    Attributes:
        channels: C, the width of the row before.
        groups: Upper bound of the number of groups.
        gain: The output is multiplied by it.
    """

    channels: int
    groups: int = DEFAULT_GROUPS
    gain: float = 1.0


def builder(frame: FrameType | None) -> dict[str, Any] | None:
    """Local variables of the builder of YOLO that calls a layer from ``frame``, if one does.

    They are ``ch``, the widths of the rows so far, ``f``, the row's ``from``, and ``n``.
    """
    if frame is not None and frame.f_code.co_name in ("<genexpr>", "<listcomp>"):
        frame = frame.f_back  # a row that is repeated
    if frame is None or frame.f_code.co_name != "parse_model":
        return None
    found = frame.f_locals
    return found if {"ch", "f", "n"} <= found.keys() else None


def row_arguments(
    given: Sequence[Any], keywords: Mapping[str, Any], row: Mapping[str, Any] | None
) -> RowArguments:
    """Read the arguments of a row.

    Args:
        given: The arguments; in Python, where no builder calls, the first is the width.
        keywords: ``groups`` and ``gain``; None counts as not given. A mapping at the end of
            ``given`` adds to them.
        row: The result of `builder`.

    Raises:
        ValueError: If the arguments are others than those above, or the row reads another one
            than the row before.
    """
    shown, width = _shown(given, row), _width(given, row)
    numbers = list(given)
    keywords = {key: value for key, value in keywords.items() if value is not None}
    if numbers and isinstance(numbers[-1], Mapping):
        keywords = {**numbers.pop(), **keywords}
    if numbers and numbers[0] == width:
        numbers.pop(0)
        if len(numbers) == 2 and numbers[1] == _OLD_GAIN and not keywords:
            keywords = {"gain": numbers.pop()}
    gain = keywords.get("gain", 1.0)
    understood = (
        keywords.keys() <= {"groups", "gain"}
        and len(numbers) + ("groups" in keywords) <= 1
        and all(_is_count(number) and number <= DEFAULT_GROUPS for number in numbers)
        and all(_is_count(number) for number in (width, keywords.get("groups", 1)))
        and isinstance(gain, Real)
        and not isinstance(gain, bool)
        and gain > 0
    )
    if not understood:
        raise ValueError(f"{shown} is not understood: {_RULE}. {REMEDY}.")
    groups = numbers[0] if numbers else keywords.get("groups", DEFAULT_GROUPS)
    return RowArguments(width, groups, float(gain))


def _width(given: Sequence[Any], row: Mapping[str, Any] | None) -> Any:
    if row is None:
        return given[0] if given else None
    if row["f"] not in (-1, len(row["ch"]) - 1):
        raise ValueError(
            f"{_shown(given, row)} reads row {row['f']}, but an {NAME} row reads the row before: "
            f"'from' must be -1. {REMEDY}."
        )
    return row["ch"][-1]


def _shown(given: Sequence[Any], row: Mapping[str, Any] | None) -> str:
    """The row as its writer knows it; names in it are resolved."""
    listed = ", ".join(map(str, given))
    if row is None:
        return f"{NAME}Row({listed})"
    number = f" {row['i']}" if "i" in row else ""
    return f"Row{number}, [{row['f']}, {row['n']}, {NAME}, [{listed}]],"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
