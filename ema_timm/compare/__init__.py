"""One network with several attention layers, several seeds each: the runs and their table."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.compare.comparison import compare, list_commands
    from ema_timm.compare.settings import CompareConfig, Comparison, make_comparison
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(("compare", "list_commands"), "comparison"),
            **dict.fromkeys(("CompareConfig", "Comparison", "make_comparison"), "settings"),
        },
    )

__all__ = ["CompareConfig", "Comparison", "compare", "list_commands", "make_comparison"]
