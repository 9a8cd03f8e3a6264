"""Reads JSON and YAML files of others, and checks the types of their fields.

Whatever such a file holds, the outcome is data of the expected types, or an error that says what is
wrong with which field.
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

import yaml

from ema_timm.errors import UserError
from ema_timm.repeated import unique

DEEPEST = 50
"""Most levels of lists and mappings in a file."""
MOST_VALUES = 1_000_000
"""Most values in a file. Aliases can expand a few lines of YAML to billions."""
_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError)
"""What PyYAML raises, beside its own errors, for values that do not fit their tags (`!!int ""`)."""


def load_json(file: Path, encoding: str = "utf-8") -> Any:
    """The content of a JSON file.

    Args:
        file: The file.
        encoding: "utf-8-sig" accepts the byte order mark that editors on Windows write. timm and
            transformers read their files without.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON in UTF-8, gives a key twice, or is nested deeper than
            `DEEPEST`.
    """
    try:
        content = json.loads(file.read_text(encoding), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_bounds(content)
    return content


def load_yaml(file: Path) -> Any:
    """The content of a YAML file of plain values whose keys are text.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not such a YAML in UTF-8, gives a key twice, or is nested deeper than
            `DEEPEST`.
    """
    text, depth = file.read_text("utf-8"), 0
    try:
        for event in yaml.parse(text):  # PyYAML takes minutes to load deeply nested text
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(_TOO_DEEP)
        content = yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, *CONSTRUCTOR_ERRORS) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    _check_bounds(content)
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; PyYAML keeps the last one."""

    def compose_mapping_node(self, anchor):
        """Read a mapping, before keys are merged into it."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in lines:
                twice = f"{key.value} is given twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            lines[name] = line
        return node


def _check_bounds(content: Any) -> None:
    """Refuse what cannot be written again, or takes endless time to go through.

    Raises:
        ValueError: For too many levels or values, keys that are not text, and half of a pair of
            surrogates in a text, which no file can hold.
    """
    left, values = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        values += 1
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        if isinstance(value, str):
            value.encode(errors="surrogateescape")  # a file name that is not UTF-8
        elif isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"the key {reprlib.repr(wrong[0])} is not text")
            left += ((each, depth + 1) for pair in value.items() for each in pair)
        elif isinstance(value, list | tuple):
            left += ((each, depth + 1) for each in value)


def check_fields(content: Any, kind: Any, place: str | Path, remedy: str) -> None:
    """Check the types of a file's fields.

    Args:
        content: The content.
        kind: The expected type: ``int``, ``float`` (finite, also an ``int``), ``str``, ``bool``,
            ``dict`` or ``list``; ``[kind]`` is a list of that kind. A mapping gives the kinds of
            the fields of an object: ``"name?"`` may be missing or null, ``"*"`` stands for each
            field, and fields that are not listed may be anything.
        place: The file, for the error.
        remedy: The last sentence of the error.

    Raises:
        UserError: For the first field that is missing or has another type.
    """
    fault = _fault(content, kind, "")
    if fault:
        raise UserError(f"{place}: {fault}. {remedy}")


def _fault(value: Any, kind: Any, name: str) -> str:
    """What is wrong with the first wrong field; empty if nothing is."""
    if isinstance(kind, list):
        return _kind_fault(value, list, name) or _first(
            _fault(each, kind[0], f"{name}[{index}]") for index, each in enumerate(value)
        )
    if not isinstance(kind, dict):
        return _kind_fault(value, kind, name)
    return _kind_fault(value, dict, name) or _first(
        _field_fault(value, key, inner, f"{name}." if name else "") for key, inner in kind.items()
    )


def _field_fault(content: dict, key: str, kind: Any, prefix: str) -> str:
    """What is wrong with one field of an object, or with each of them if ``key`` is ``"*"``."""
    if key == "*":
        return _first(_fault(each, kind, f"{prefix}{name}") for name, each in content.items())
    name = key.removesuffix("?")
    if content.get(name) is None and key.endswith("?"):
        return ""
    if name not in content:
        return f"{prefix}{name} is missing"
    return _fault(content[name], kind, f"{prefix}{name}")


def _first(faults) -> str:
    return next(filter(None, faults), "")


def _kind_fault(value: Any, kind: type, name: str) -> str:
    if is_kind(value, kind):
        return ""
    return f"{name or 'its content'} must be {_EXPECTED[kind]}, got {reprlib.repr(value)}"


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value of a file has a type; a ``float`` is any finite number."""
    if kind is float:
        # Larger whole numbers, of which JSON may have thousands of digits, are no floats.
        whole = is_kind(value, int) and abs(value) < 2**1000
        return whole or (isinstance(value, float) and math.isfinite(value))
    if kind is list:
        return isinstance(value, list | tuple)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
