"""A checkpoint folder for others: one verified commit on the Hugging Face Hub."""

from typing import TYPE_CHECKING

from ema_timm.lazy import lazy_names

if TYPE_CHECKING:
    from ema_timm.hub.commit import Destination, Landed
    from ema_timm.publishing.upload import publish, rehearse
else:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(("Destination", "Landed", "publish", "rehearse"), "upload")
    )

__all__ = ["Destination", "Landed", "publish", "rehearse"]
