"""EMA attention (Efficient Multi-scale Attention, arXiv:2305.13563) for timm.

This is not an exponential moving average. Importing the package registers its models with timm,
now or when timm is imported later. It does not import torch or timm itself.
"""

from typing import TYPE_CHECKING

import ema_timm_autoload
from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.attention import EmaAttn, set_implementation
    from ema_timm.backbones.inject import inject
    from ema_timm.backbones.placement import placement
    from ema_timm.ops import EmaWeights, ema_attention
    from ema_timm.tuning.tuner import tune
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "EmaAttn": "attention",
            "EmaWeights": "ops",
            "ema_attention": "ops",
            "inject": "backbones.inject",
            "placement": "backbones.placement",
            "set_implementation": "attention",
            "tune": "tuning.tuner",
        },
    )

__version__ = "0.2.0"

__all__ = [
    "EmaAttn",
    "EmaWeights",
    "__version__",
    "ema_attention",
    "inject",
    "placement",
    "set_implementation",
    "tune",
]

ema_timm_autoload.install()
