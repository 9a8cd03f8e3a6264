"""The installed timm, and a check that this package supports it."""

import re

import timm

OLDEST = (1, 0, 24)
TIMM_VERSION = tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3])


class OldTimmError(RuntimeError):
    """The installed timm is too old."""

    has_remedy = True
    """`ema_timm_autoload` then adds no remedy, which would contradict this one."""


def require_supported_timm() -> None:
    """Raise OldTimmError, with the remedy, if timm is older than `OLDEST`."""
    if TIMM_VERSION < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OldTimmError(
            f"needs timm >= {oldest}, found {timm.__version__}: pip install -U 'timm>={oldest}'"
        )
