"""EMA attention (Efficient Multi-scale Attention, arXiv:2305.13563) for timm.

Not an exponential moving average. Importing this package registers its models with timm, now or
when timm is imported; it imports neither torch nor timm by itself.
"""

import ema_timm_autoload

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


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


ema_timm_autoload.install()
