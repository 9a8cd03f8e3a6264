"""The row that puts EMA attention inside the blocks of a YOLO network.

``[-1, 1, EmaAttnInside, [C3k2]]`` returns its input. When a builder of YOLO makes it, it adds a
layer after each direct element of ``m`` of every C3k2 in the rows before. So the model YAML says
all, and training, resuming, the workers of several GPUs and YOLOv5 build the layers again without a
trainer of their own.

YOLO's checkpoints are pickles that name this module and class, so neither may be renamed.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.errors import sentence, some
from ema_timm.integrations.yolo.arguments import builder

INSIDE = "EmaAttnInside"
"""The row's name."""

_EXAMPLE = f"Write [-1, 1, {INSIDE}, [C3k2]], or [-1, 1, {INSIDE}, [C3k2, C2f, {{groups: 8}}]]"
_PIXELS = 32  # a multiple of what any block divides a map by


class EmaAttnInside(nn.Module):
    """A row that adds EMA attention inside the blocks of the rows before, and returns its input.

    Args:
        given: Names of classes. A mapping at the end may give ``groups``, the maximum number of
            groups of each layer (32 by default), and ``gain``: 2 is the identity initialisation,
            1 (the default) the paper's layer.

    Raises:
        ValueError: If the arguments are others, or a block cannot take a layer.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.classes, self.groups, self.gain = _arguments(given)
        row = builder(sys._getframe(1))
        if row is not None:
            fill_blocks(row["layers"], self.classes, self.groups, self.gain)

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class name."""
        return f"{', '.join(self.classes)}, groups={self.groups}, gain={self.gain}"


def _arguments(given: Sequence[Any]) -> tuple[list[str], int, int]:
    """Classes, groups and gain. YOLOv5 resolves the names to the classes themselves."""
    last = given[-1] if given and isinstance(given[-1], Mapping) else {}
    classes = [getattr(each, "__name__", each) for each in given[: len(given) - bool(last)]]
    groups, gain = last.get("groups", DEFAULT_GROUPS), last.get("gain", 1)
    understood = (
        classes
        and all(isinstance(each, str) for each in classes)
        and last.keys() <= {"groups", "gain"}
        and type(groups) is int
        and groups > 0
        and gain in (1, 2)
    )
    if not understood:
        shown = ", ".join(map(str, given))
        raise ValueError(
            f"[-1, 1, {INSIDE}, [{shown}]] is not understood: its arguments are names of classes, "
            f"and groups and gain (1 or 2) by keyword. {_EXAMPLE}."
        )
    return classes, groups, int(gain)


def fill_blocks(rows: Iterable[nn.Module], classes: Sequence[str], groups: int, gain: int) -> None:
    """Add a layer after each direct element of ``m`` of the blocks of some classes, in place.

    Args:
        rows: Rows of a network.
        classes: Names of classes; their subclasses are others.
        groups: Maximum number of groups of each layer.
        gain: 2 is the identity initialisation, 1 the paper's layer.

    Raises:
        ValueError: If a class has no such block, or a block cannot take a layer.
    """
    from ema_timm.backbones.places import choose, fill
    from ema_timm.backbones.trace import on_meta

    rows = nn.ModuleList(rows)
    blocks = {name: m for name, m in rows.named_modules() if _has_elements(m)}
    known = sorted({type(block).__name__ for block in blocks.values()})
    for each in classes:
        if each not in known:
            raise ValueError(
                f"no row before {INSIDE} has a block {each} with elements in m. There are "
                f"{some(known, 8) or 'none'}. {_EXAMPLE}."
            )
    for name, block in blocks.items():
        kind = type(block).__name__
        if kind not in classes:
            continue
        first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        example = torch.empty(1, first.in_channels, _PIXELS, _PIXELS, device="meta")
        try:
            places = choose(on_meta(block), "m.*", example, groups, gain, False, True)
        except ValueError as error:
            number = name.partition(".")[0]
            raise ValueError(f"row {number}, {kind}: {sentence(error)}") from error
        fill(block, places)


def _has_elements(module: nn.Module) -> bool:
    """Whether ``m`` holds layers with convolutions inside, unlike the ``m`` of a head."""
    elements = getattr(module, "m", None)
    return isinstance(elements, nn.Sequential | nn.ModuleList) and any(
        part is not element and isinstance(part, nn.Conv2d)
        for element in elements
        for part in element.modules()
    )
