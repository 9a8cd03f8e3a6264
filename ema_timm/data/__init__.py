"""Images and labels: files, folders, data sets by name, splits, and checks of them."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.data.images import read_image
else:
    __getattr__, __dir__ = lazy_names(__name__, {"read_image": "images"})

__all__ = ["read_image"]
