"""One network with several attention layers, several seeds each: the runs and their table."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_timm.compare.comparison import compare, list_commands
    from ema_timm.compare.settings import CompareConfig, Comparison, make_comparison
else:
    _MODULES = {
        **dict.fromkeys(("compare", "list_commands"), "comparison"),
        **dict.fromkeys(("CompareConfig", "Comparison", "make_comparison"), "settings"),
    }

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["CompareConfig", "Comparison", "compare", "list_commands", "make_comparison"]
