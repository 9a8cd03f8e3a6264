"""Finds the state dict in a checkpoint's content, and the prefix that its names have in the file.

Wrappers such as Lightning's modules put the network into an attribute, so that each of its names
begins with ``net.`` or ``model.``. Other code has other keys for the state dict.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ema_timm.errors import UserError, some

USUAL_KEYS = ("state_dict", "model")
"""The keys of trained weights, as timm itself looks for them."""
_AVERAGED = ("state_dict_ema", "model_ema")
_NAMES_AN_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|averaged?)(?:_|$)")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and compile
_COUNTER = "num_batches_tracked"


class FoundState(NamedTuple):
    """The weights in a checkpoint's content.

    Attributes:
        tensors: Tensors by name, without the wrappers ``module.`` and ``_orig_mod.``.
        key: The key of the content that held them; empty if the content is the state dict.
        averaged: Whether these are averaged weights, as of timm's ``--model-ema``.
        other: The key of the trained weights if these are averaged, else that of averaged ones;
            empty without such a key.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    averaged: bool = False
    other: str = ""


def find_state(content: Mapping, averaged: bool | None = None) -> FoundState:
    """The state dict in a checkpoint's content.

    Args:
        content: A state dict, or a mapping with one state dict under any key.
        averaged: Take the averaged weights, or the trained ones. None takes the averaged weights
            of timm's train script if there are some, as timm's own ``load_state_dict`` does.

    Raises:
        UserError: If there are none, or several.
    """
    if averaged is None:
        averaged = any(_is_state(content.get(key)) for key in _AVERAGED)
    key, other = _key(content, averaged), _key(content, not averaged, several=True)
    if key is None and averaged:
        raise UserError(
            "it has no averaged weights. Train with timm's --model-ema, or leave out "
            "--use-averaged."
        )
    state = content if key is None else content[key]
    if not _is_state(state) and other:
        raise UserError(f"it has only averaged weights ({other}). Leave out --no-use-averaged.")
    if not _is_state(state):
        raise UserError(
            "it has no state dict, a mapping of names to tensors. Save model.state_dict(), or give "
            "a checkpoint of timm's train script."
        )
    # n_averaged is the counter of torch's AveragedModel, beside the network behind module.
    tensors = {_WRAPPERS.sub("", name): t for name, t in state.items() if name != "n_averaged"}
    return FoundState(tensors, key or "", averaged, other or "")


def find_prefix(names: Iterable[str], expected: Collection[str]) -> str:
    """The prefix, such as ``"net."``, behind which a state dict has the names of a network.

    Args:
        names: The names in the state dict.
        expected: The names of the network.

    Returns:
        The prefix; empty if the names fit without one, or most of them with none.

    Raises:
        UserError: If they fit behind several, as those of a student and its teacher.
    """
    expected, hits = set(expected), Counter[str]()
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in expected:
                hits["".join(f"{part}." for part in parts[:depth])] += 1
    most = max(hits.values(), default=0)
    if 2 * most < len(expected) or hits[""] == most:
        return ""
    best = [prefix for prefix, count in hits.items() if count == most]
    if len(best) > 1:
        raise UserError(
            "the checkpoint holds the network several times: its names follow "
            f"{' and '.join(sorted(best))}. Save the state dict of one of them, and give that file."
        )
    return best[0]


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A state dict whose names lose a prefix. Names without it stay as they are."""
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return {**{n: t for n, t in state.items() if not n.startswith(prefix)}, **inside}


def is_counter(name: str) -> bool:
    """Whether a tensor is batch norm's counter of batches, which changes no output."""
    return name.rpartition(".")[2] == _COUNTER


def _key(content: Mapping, averaged: bool, several: bool = False) -> str | None:
    """The key of the averaged or of the trained weights; None if there is none.

    Args:
        content: A checkpoint's content.
        averaged: Which of the two.
        several: Take the first of several keys that timm does not use.

    Raises:
        UserError: If there are several, and ``several`` is off.
    """
    for key in _AVERAGED if averaged else USUAL_KEYS:
        if _is_state(content.get(key)):
            return key
    known = (*USUAL_KEYS, *_AVERAGED)
    others = (str(key) for key, value in content.items() if key not in known and _is_network(value))
    keys = [key for key in others if bool(_NAMES_AN_AVERAGE.search(key)) == averaged]
    if len(keys) > 1 and not several:
        raise UserError(
            f"it has {len(keys)} state dicts: {some(keys)}. Save the one of your network, such as "
            f"torch.save(checkpoint[{keys[0]!r}], 'weights.pt'), and give that file."
        )
    return keys[0] if keys else None


def _is_state(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def _is_network(value: Any) -> bool:
    """Whether a value is a state dict of a network, not for example one of metrics."""
    return _is_state(value) and any(tensor.ndim > 1 for tensor in value.values())
