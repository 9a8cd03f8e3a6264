"""The layer that a row ``[-1, 1, EmaAttn, []]`` of a YOLO model YAML builds.

YOLO's builders look the name ``EmaAttn`` up in their own module, so `register` puts it there, with
that of `ema_timm.integrations.yolo.inside`.
YOLO's checkpoints are pickles that name this module and class, so neither may be renamed.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.hooks import HOOKS
from ema_timm.integrations.yolo.arguments import REMEDY, builder, row_arguments
from ema_timm.integrations.yolo.inside import INSIDE, EmaAttnInside
from ema_timm.integrations.yolo.rows import NAME


class EmaAttnRow(EmaAttn):
    """`EmaAttn` as a row of a YOLO model YAML: ``[-1, 1, EmaAttn, [groups]]``.

    Args:
        given: The row's arguments, which `ema_timm.integrations.yolo.arguments` explains. The width
            comes from YOLO's builder; in Python it is the first argument.
        groups: Maximum number of groups, 32 by default. The largest divisor of the width up to it
            is used, so that one YAML fits every scale.
        gain: The output is multiplied by it. 2 undoes the gate of one half that the identity
            initialisation has (`ema_timm.integrations.yolo.injection`); 1 is the paper's layer.

    Raises:
        ValueError: If the arguments are not understood. The message shows the row.
    """

    gain: float = 1.0  # of pickles of a pasted class, which have none

    def __init__(self, *given: Any, groups: int | None = None, gain: float | None = None) -> None:
        keywords = {"groups": groups, "gain": gain}
        row = row_arguments(given, keywords, builder(sys._getframe(1)))
        super().__init__(row.channels, groups=largest_group_count(row.channels, row.groups))
        self.gain = row.gain

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``.

        Args:
            x: Feature map, (B, C, H, W), floating point.

        Returns:
            (B, C, H, W), the dtype and memory format of ``x``.

        Raises:
            ValueError: If ``x`` is several maps, or not C wide: the row is wrong.
        """
        if not torch.jit.is_scripting():
            _require_row_before(x, self.channels)
        out = self.gated(x)
        return out if self.gain == 1 else out * self.gain

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class name."""
        return super().extra_repr() + ("" if self.gain == 1 else f", gain={self.gain:g}")


def _require_row_before(x: Tensor | Sequence[Tensor], channels: int) -> None:
    if isinstance(x, list | tuple):
        raise ValueError(f"An {NAME} row takes one map, and its 'from' names {len(x)}. {REMEDY}.")
    # A tracer's shapes are not numbers, and a traced layer has run before.
    plain = isinstance(x, Tensor) and not torch.jit.is_tracing()
    if plain and x.dim() == 4 and x.shape[1] != channels:
        raise ValueError(
            f"An {NAME} row of width {channels} got a map of width {x.shape[1]}. {REMEDY}, and "
            "'from' must be -1."
        )


def count_for_thop(layer: EmaAttn, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add the layer's operations to thop's count, from which YOLO prints GFLOPs: 10nHW a group.

    These are the collapsed 3×3 convolution and the cross-spatial weights of the normalised branch,
    as in `ema_timm.backbones.complexity`. The terms that do not grow with the area, n²(H + W) + 9n²
    a group, are not counted: YOLO profiles a map of one stride and multiplies by the area, which
    would turn thousands into billions. At 640 pixels they are under 0.01 GFLOPs a layer.

    Args:
        layer: The layer; ``total_ops`` is thop's count of multiply-accumulates.
        inputs: What it was called with.
        output: What it returned, (B, C, H, W).
    """
    batch, _, height, width = output.shape
    layer.total_ops += 10 * layer.channels * batch * height * width


ROWS: dict[str, type[nn.Module]] = {NAME: EmaAttnRow, INSIDE: EmaAttnInside}
"""The layers by the names that rows give them."""


def register(module: ModuleType) -> None:
    """Register the layers with the builder in ``module``; a second call does nothing.

    If the user has put another class of a name there, it stays.

    Args:
        module: ``ultralytics.nn.tasks``, or ``models.yolo`` of YOLOv5, which may still be loading.
            A module without ``parse_model`` belongs to another project and is not changed.
    """
    if not _builds(module):
        return
    for name, ours in ROWS.items():
        theirs = vars(module).setdefault(name, ours)
        if theirs is not ours:
            warnings.warn(
                f"{module.__name__} has its own {name} ({theirs!r}), and rows of that name build "
                "it instead of ema-timm's layer. Give yours another name to have both.",
                UserWarning,
                stacklevel=2,
            )
    # What ULTRALYTICS_SAFE_LOAD=1, and any torch.load(weights_only=True), may rebuild.
    torch.serialization.add_safe_globals([*ROWS.values(), EmaAttn, *HOOKS.values()])
    try:
        thop = importlib.import_module("thop.profile")
    except ImportError:
        return  # both builders then print no GFLOPs at all
    for kind in (EmaAttn, EmaAttnRow):
        thop.register_hooks[kind] = count_for_thop


def _builds(module: ModuleType) -> bool:
    """Whether a module is a builder of YOLO, or will be one when it has been loaded."""
    if hasattr(module, "parse_model"):
        return True
    file = getattr(module, "__file__", None)
    loaded = Path(file) if file else None
    return (
        loaded is not None
        and loaded.suffix == ".py"
        and loaded.is_file()
        and b"\ndef parse_model(" in loaded.read_bytes()
    )
