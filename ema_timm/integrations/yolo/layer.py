"""The layer that a row ``[-1, 1, EmaAttn, [c2]]`` of a YOLO model YAML builds.

YOLO's builders look the name ``EmaAttn`` up in their own module, so `register` puts it there.
YOLO's checkpoints are pickles that name this module and class, so neither may be renamed.
"""

import importlib
import warnings
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor

from ema_timm.attention import DEFAULT_GROUPS, EmaAttn, largest_group_count
from ema_timm.integrations.yolo.rows import NAME

_ROW = f"Write the row as [-1, 1, {NAME}, [c2]]; c2 is the width of the row before, at every scale"


class EmaAttnRow(EmaAttn):
    """`EmaAttn` as a row of a YOLO model YAML: ``[-1, 1, EmaAttn, [c2, groups, gain]]``.

    Args:
        channels: C, the width of the row before. In a YAML ``c2``, which both builders resolve.
        groups: Maximum number of groups. The largest divisor of C up to it is used, so that one
            YAML fits every scale.
        gain: The output is multiplied by it. 2 undoes the gate of one half that the identity
            initialisation has (`ema_timm.integrations.yolo.injection`); 1 is the paper's layer.

    Raises:
        TypeError: If an argument is missing, one too many, or of the wrong kind.
        ValueError: If a number is out of range.
    """

    def __init__(self, channels=None, groups=DEFAULT_GROUPS, gain=1.0, *rest):
        given = (channels, groups, *rest)
        if channels is None or rest or not all(_is_int(value) for value in given):
            shown = ", ".join(map(repr, given)) if channels is not None else "no width"
            raise TypeError(f"An {NAME} row takes a width and perhaps groups, got {shown}. {_ROW}.")
        if isinstance(gain, bool) or not isinstance(gain, Real):
            raise TypeError(f"The gain of an {NAME} row must be a number, got {gain!r}. {_ROW}.")
        if channels < 1 or groups < 1 or gain <= 0:
            raise ValueError(
                f"The numbers of an {NAME} row must be at least 1, and its gain above 0, got "
                f"[{channels}, {groups}, {gain}]. {_ROW}."
            )
        super().__init__(channels, largest_group_count(channels, groups))
        self.gain = float(gain)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``.

        Args:
            x: Feature map, (B, C, H, W), floating point.

        Returns:
            (B, C, H, W), the dtype and memory format of ``x``.

        Raises:
            ValueError: If ``x`` is several maps, or not C wide: the row is wrong.
        """
        if isinstance(x, list | tuple):
            raise ValueError(f"An {NAME} row takes one map, and its 'from' names {len(x)}. {_ROW}.")
        # A tracer's shapes are not numbers, and a traced layer has run before.
        plain = isinstance(x, Tensor) and not torch.jit.is_tracing()
        if plain and x.dim() == 4 and x.shape[1] != self.channels:
            raise ValueError(
                f"An {NAME} row of width {self.channels} got a map of width {x.shape[1]}. {_ROW}, "
                "and 'from' must be -1."
            )
        out = super().forward(x)
        return out if self.gain == 1 else out * self.gain

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class name."""
        return super().extra_repr() + ("" if self.gain == 1 else f", gain={self.gain:g}")


def count_for_thop(layer: EmaAttnRow, inputs: tuple[Tensor, ...], output: Tensor) -> None:
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


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def register(module: ModuleType) -> None:
    """Register the layer with the builder in ``module``; a second call does nothing.

    If the user has put another class of that name there, it stays.

    Args:
        module: ``ultralytics.nn.tasks``, or ``models.yolo`` of YOLOv5. A module without
            ``parse_model`` belongs to another project and is not changed.
    """
    if not hasattr(module, "parse_model"):
        return
    theirs = vars(module).setdefault(NAME, EmaAttnRow)
    if theirs is not EmaAttnRow:
        warnings.warn(
            f"{module.__name__} has its own {NAME} ({theirs!r}), and rows of that name build it "
            "instead of ema-timm's layer. Give yours another name to have both.",
            UserWarning,
            stacklevel=2,
        )
    # What ULTRALYTICS_SAFE_LOAD=1, and any torch.load(weights_only=True), may rebuild.
    torch.serialization.add_safe_globals([EmaAttnRow])
    try:
        thop = importlib.import_module("thop.profile")
    except ImportError:
        return  # both builders then print no GFLOPs at all
    thop.register_hooks[EmaAttnRow] = count_for_thop
