"""Which timm is installed, and whether it is one that this package supports."""

import re

import timm

OLDEST = (1, 0, 24)
TIMM_VERSION = tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3])


class OldTimmError(RuntimeError):
    """The installed timm is too old."""

    has_remedy = True
    """`ema_timm_autoload` then adds none of its own, which would contradict it."""


def require_supported_timm() -> None:
    """Raise OldTimmError, with the remedy, where timm is older than `OLDEST`."""
    if TIMM_VERSION < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OldTimmError(
            f"needs timm >= {oldest}, found {timm.__version__}: pip install -U 'timm>={oldest}'"
        )
