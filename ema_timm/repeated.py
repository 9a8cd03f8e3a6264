"""Options that are repeated and keys that are given twice: nothing is dropped in silence."""

import argparse
from collections.abc import Iterable
from typing import Any


def unique(pairs: Iterable[tuple[str, Any]]) -> dict:
    """A dictionary of pairs; also ``object_pairs_hook`` of a JSON file that users write.

    Raises:
        ValueError: For a key that is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


class Pairs(argparse.Action):
    """Collect the pairs of an option, which can be repeated; a key given twice is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Add the pairs of one occurrence."""
        before = getattr(namespace, self.dest, None) or {}
        try:
            setattr(namespace, self.dest, unique([*before.items(), *values]))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


class Once(argparse.Action):
    """Store the values of an option; a repetition, which would replace them, is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the values of the only occurrence."""
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "is given twice; give everything in one")
        setattr(namespace, self.dest, values)
