"""The name ``EmaAttn`` for the builders of YOLO models, which look rows up in their own module."""

import importlib
import warnings
from types import ModuleType

import torch

from ema_timm.attention import FoldedEma
from ema_timm.integrations.yolo.layer import EmaAttnRow, count_for_thop
from ema_timm.integrations.yolo.rows import NAME


def register(module: ModuleType) -> None:
    """Let the builder in ``module`` know the layer; a second call does nothing.

    A class of that name that the user put there stays.

    Args:
        module: ``ultralytics.nn.tasks``, or ``models.yolo`` of YOLOv5. A module without
            ``parse_model`` is another project's and is left alone.
    """
    if not hasattr(module, "parse_model"):
        return
    theirs = vars(module).setdefault(NAME, EmaAttnRow)
    if theirs is not EmaAttnRow:
        warnings.warn(
            f"{module.__name__} has an {NAME} of its own ({theirs!r}), and rows of that name build "
            "it, not ema-timm's layer. Give yours another name to have both.",
            UserWarning,
            stacklevel=2,
        )
    # What ULTRALYTICS_SAFE_LOAD=1, and any torch.load(weights_only=True), may rebuild.
    torch.serialization.add_safe_globals([EmaAttnRow, FoldedEma])
    try:
        thop = importlib.import_module("thop.profile")
    except ImportError:
        return  # both builders then print no GFLOPs at all
    thop.register_hooks[EmaAttnRow] = count_for_thop
