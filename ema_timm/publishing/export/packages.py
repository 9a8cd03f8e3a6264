"""What the formats and runtimes need beyond PyTorch."""

from importlib.util import find_spec

from ema_timm.errors import UserError


def require(*packages: str) -> None:
    """Name what is missing, before any work.

    Raises:
        UserError: If a package is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'ema-timm[export]'")
