"""A picture of a measurement, by matplotlib."""

from pathlib import Path

from ema_timm.bench.report.kinds import KINDS
from ema_timm.errors import UserError


def plot(result: dict, file: str | Path) -> None:
    """Draw a measurement as a PNG.

    Raises:
        UserError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'ema-timm[train]'") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    KINDS[result["bench"]].plot(result, figure)
    figure.suptitle(f"{result['machine']['name']}, {result['machine']['threads']} threads")
    figure.savefig(file, format="png", dpi=120)
