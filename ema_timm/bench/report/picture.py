"""Pictures of measurements with matplotlib: one in full, or several at a glance."""

from collections.abc import Sequence
from pathlib import Path

from ema_timm.bench.report.kinds import KINDS, measurement
from ema_timm.bench.report.markdown import machine_line, settings_line
from ema_timm.bench.report.panel import Panel, draw
from ema_timm.errors import UserError, require_packages
from ema_timm.files import sha256, write_whole

SOURCE = "Source"
"""Text field of the PNG that lists its input files, one line each with the sha256."""


def plot(result: dict, file: str | Path) -> None:
    """Draw a measurement as a PNG.

    Raises:
        UserError: If matplotlib is missing.
    """
    figure = _figure("--plot", width=10, height=5)
    KINDS[result["bench"]].plot(result, figure)
    figure.suptitle(f"{result['machine']['name']}, {result['machine']['threads']} threads")
    figure.savefig(file, format="png", dpi=120)


def picture(files: Sequence[str | Path], output: str | Path) -> None:
    """Draw the panels of several measurements side by side, as a PNG for a README.

    Args:
        files: JSON of measurements; each becomes a panel.
        output: The PNG. It holds the sha256 of every file, so that a test can check whether it is
            up to date.

    Raises:
        UserError: If a file holds no measurement, or its kind has no panel, or matplotlib is
            missing.
    """
    results, panels = [], []
    for file in files:
        with measurement(file) as result:
            panels.append(_panel(result))
            results.append(result)
    figure = _figure("bench picture", width=4.2 * len(files), height=4.2)
    for panel, part in zip(panels, figure.subfigures(1, len(files), squeeze=False)[0], strict=True):
        draw(panel, part)
    figure.supxlabel(_small_print(results), fontsize=7, x=0.01, ha="left")
    source = "\n".join(f"{Path(file).name} {sha256(Path(file))}" for file in files)
    write_whole(
        Path(output),
        lambda path: figure.savefig(
            path, format="png", dpi=160, facecolor="white", metadata={SOURCE: source}
        ),
    )


def _figure(what: str, width: float, height: float):
    """An empty figure; width and height in inches."""
    require_packages(["matplotlib"], "train", what)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panel(result: dict) -> Panel:
    kind = KINDS[result["bench"]]
    if not kind.glance:
        known = ", ".join(name for name, other in KINDS.items() if other.glance)
        raise UserError(
            f"bench picture shows {known}, not {result['bench']}. Use --plot of that measurement."
        )
    return kind.glance(result)


def _small_print(results: list[dict]) -> str:
    machines = dict.fromkeys(machine_line(result) for result in results)
    settings = (f"{result['bench']}: {settings_line(result)}" for result in results)
    bars = "Bars are medians, whiskers reach from the smallest to the largest."
    return "\n".join([f"{'; '.join(machines)}. {bars}", "; ".join(settings)])
