"""EMA attention (Efficient Multi-scale Attention, arXiv:2305.13563) for timm.

This is not an exponential moving average. Importing the package registers its models with timm,
now or when timm is imported later. It does not import torch or timm itself.
"""

from typing import TYPE_CHECKING

import ema_timm_autoload

if TYPE_CHECKING:
    from ema_timm.attention import EmaAttn, set_implementation
    from ema_timm.backbones.inject import inject
    from ema_timm.ops import EmaWeights, ema_attention
    from ema_timm.tuning.tuner import tune
else:
    # Imported when they are first used, so that this module needs no torch. A type checker must
    # not see this function: it would accept every name.
    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


__version__ = "0.2.0"

_HOME = {
    "EmaAttn": "ema_timm.attention",
    "EmaWeights": "ema_timm.ops",
    "ema_attention": "ema_timm.ops",
    "inject": "ema_timm.backbones.inject",
    "set_implementation": "ema_timm.attention",
    "tune": "ema_timm.tuning.tuner",
}

__all__ = [
    "EmaAttn",
    "EmaWeights",
    "__version__",
    "ema_attention",
    "inject",
    "set_implementation",
    "tune",
]


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


ema_timm_autoload.install()
