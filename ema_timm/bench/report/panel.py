"""A panel of bars for ``bench picture``: its data, and how it is drawn."""

from typing import NamedTuple

from ema_timm.figures import OKABE_ITO

COLORS = {
    "ours": OKABE_ITO["blue"],
    "authors": OKABE_ITO["vermilion"],
    "base": "#555555",
    "other": "#AAAAAA",
}

SIZE = 8.5
"""Text size in points: about 11 pixels if a README shows two panels on 800 pixels."""

_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}
"""Background of text, so that no line crosses it."""


class Bar(NamedTuple):
    """One bar.

    Attributes:
        name: Its label.
        role: A key of `COLORS`; all bars are relative to "base".
        value: Median, in the panel's unit.
        low: Smallest.
        high: Largest.
        text: The value as text, with the measured number.
    """

    name: str
    role: str
    value: float
    low: float
    high: float
    text: str


class Panel(NamedTuple):
    """Bars in groups, from zero, against one mark.

    Attributes:
        title: The quantity, what it is relative to, and which direction is better; two lines.
        unit: Unit of the axis, which is linear and starts at zero.
        mark: The value that all bars are relative to, in that unit.
        groups: Bars by the heading above them.
    """

    title: str
    unit: str
    mark: float
    groups: dict[str, list[Bar]]


def draw(panel: Panel, figure) -> None:
    """Draw horizontal bars into a matplotlib figure or part of one, from top to bottom."""
    axes = figure.subplots()
    figure.suptitle(panel.title, x=0.02, horizontalalignment="left", size=SIZE + 1)
    ticks, y = {}, 0.0
    for heading, bars in panel.groups.items():
        axes.text(0, y, heading, size=SIZE, weight="bold", verticalalignment="center", bbox=_PAPER)
        for bar in bars:
            y += 1
            ticks[y] = bar.name
            _draw_bar(bar, y, axes)
        y += 1.4
    axes.axvline(panel.mark, color="black", linewidth=0.9, linestyle="dashed", zorder=0)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(labelsize=SIZE)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.7, -0.7)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(f"{{x:g}}{panel.unit}")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_bar(bar: Bar, y: float, axes) -> None:
    axes.barh(y, bar.value, height=0.8, color=COLORS[bar.role])
    spread = [[bar.value - bar.low], [bar.high - bar.value]]
    axes.errorbar(bar.value, y, xerr=spread, color="black", linewidth=0.8, capsize=1.5)
    end = (max(bar.value, bar.high), y)
    offset = {"xytext": (5, 0), "textcoords": "offset points", "verticalalignment": "center"}
    axes.annotate(bar.text, end, size=SIZE, bbox=_PAPER, **offset)
