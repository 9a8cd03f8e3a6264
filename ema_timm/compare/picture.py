"""The figure of a comparison: accuracy against cost, and the differences to the plain network.

The right panel is the legend of the left one. Colours are Okabe and Ito's, which colour-blind
readers can tell apart, and each variant has its own marker.
"""

from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ema_timm.compare.intervals import BETTER, NO_DIFFERENCE, WORSE
from ema_timm.compare.variants import NONE
from ema_timm.figures import OKABE_ITO

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


def save_comparison(content: dict, path: Path) -> None:
    """Draw a comparison.

    Args:
        content: Content of compare.json.
        path: PNG file to write.
    """
    rows = [row for row in content["rows"] if "top1" in row]
    looks = [
        {"color": colour, "marker": mark, "linestyle": "none", "capsize": 3, "markersize": 6}
        for _, colour, mark in zip(rows, cycle(OKABE_ITO.values()), cycle(_MARKS), strict=False)
    ]
    figure = Figure(figsize=(10, 1.9 + 0.3 * max(len(rows), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_cost(left, rows, looks, content)
    _draw_differences(right, rows, looks, content)
    figure.suptitle(_title(content), fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def _title(content: dict) -> str:
    images, count = content["images"], len(content["seeds"])
    trained = f", {images['train']} training images" if "train" in images else ""
    return f"{content['model']}{trained}, {count} seed{'s' if count > 1 else ''}"


def _draw_cost(axes: Axes, rows: list[dict], looks: list[dict], content: dict) -> None:
    for row, look in zip(rows, looks, strict=True):
        axes.errorbar(row["macs"] / 1e6, row["top1"]["mean"], yerr=row["top1"]["std"], **look)
    axes.set_xlabel("multiply-accumulates of one image (M)")
    axes.set_ylabel(f"top-1 (%), {content['images']['measured_on']} images")
    axes.set_title("mean ± standard deviation over seeds", fontsize=9)
    axes.grid(alpha=0.3)


def _draw_differences(axes: Axes, rows: list[dict], looks: list[dict], content: dict) -> None:
    places = range(len(rows))
    for place, row, look in zip(places, rows, looks, strict=True):
        found = row["difference"]
        if not found and row["variant"] != NONE:
            continue
        mean = found["mean"] if found else 0.0
        bounds = None
        if found and found["low"] is not None:
            bounds = [[mean - found["low"]], [found["high"] - mean]]
        hollow = {"markerfacecolor": "white"} if found and _unclear(found) else {}
        axes.errorbar(mean, place, xerr=bounds, **look, **hollow)
    axes.axvline(0, color="grey", linewidth=1, zorder=0)
    axes.set_yticks(places, [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("difference to none, paired by seed (points)")
    title = f"together {content['confidence']:.0%} intervals; hollow: {NO_DIFFERENCE}"
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _unclear(difference: dict) -> bool:
    return difference["verdict"] not in (BETTER, WORSE)
