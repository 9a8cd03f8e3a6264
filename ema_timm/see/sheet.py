"""The contact sheet of ``predict``: images, each with its most probable class."""

from math import ceil, sqrt
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ema_timm.data.images import mode_of, read_image
from ema_timm.figures import OKABE_ITO, class_name, file_name, fitted, fitted_end
from ema_timm.files import write_whole
from ema_timm.see.predictions import Prediction

MOST_IMAGES = 200
"""Images on one sheet."""

_BLUE = OKABE_ITO["blue"]
_COLUMNS = 10
_CELL, _IMAGE, _TEXT, _LINE, _TOP = 1.6, 1.45, 0.48, 0.145, 0.32  # inches
_DPI = 120
_LETTERS = 15  # in a line of a label, next to the percentage


def save_sheet(rows: list[Prediction], channels: int, path: Path) -> int:
    """Draw the images in a grid; a bar under each is as long as its class is probable.

    Args:
        rows: Predictions of images that can be read.
        channels: 1 for greyscale, 3 for colour.
        path: PNG file to write.

    Returns:
        The number of images after the first `MOST_IMAGES`, which are not drawn.
    """
    shown = rows[:MOST_IMAGES]
    columns = max(3, min(_COLUMNS, ceil(sqrt(1.5 * len(shown)))))
    labels = [fitted(class_name(row.label[0], row.index[0]), _LETTERS, 2) for row in shown]
    lines = max([label.count("\n") + 1 for label in labels], default=1)
    cell = _IMAGE + _TEXT + (lines - 1) * _LINE
    width, height = columns * _CELL, ceil(len(shown) / columns) * cell + _TOP
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    of = f"{len(shown)} of {len(rows)} images" if len(shown) < len(rows) else f"{len(rows)} images"
    title = f"{of}, each with its most probable class (bar: probability, 0 to 100%)"
    margin = (_CELL - _IMAGE) / 2
    axes.text(margin, _TOP / 2, title, fontsize=8, va="center")
    for place, (row, label) in enumerate(zip(shown, labels, strict=True)):
        down, across = divmod(place, columns)
        left, top = across * _CELL + margin, down * cell + _TOP
        _draw_image(axes, row, channels, left, top)
        _draw_text(axes, row, label, lines, left, top + _IMAGE)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))
    return len(rows) - len(shown)


def _draw_image(axes: Axes, row: Prediction, channels: int, left: float, top: float) -> None:
    image = read_image(row.filename, mode_of(channels))
    image.thumbnail((2 * _DPI, 2 * _DPI))
    scale = _IMAGE / max(image.size)
    half_width, half_height = image.width * scale / 2, image.height * scale / 2
    x, y = left + _IMAGE / 2, top + _IMAGE / 2
    extent = (x - half_width, x + half_width, y + half_height, y - half_height)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")


def _draw_text(
    axes: Axes, row: Prediction, label: str, lines: int, left: float, top: float
) -> None:
    """Draw probability, class name in so many lines, and file name below an image."""
    prob = row.prob[0]
    axes.add_patch(Rectangle((left, top + 0.03), _IMAGE, 0.05, facecolor="#dddddd"))
    axes.add_patch(Rectangle((left, top + 0.03), _IMAGE * prob, 0.05, facecolor=_BLUE))
    text = {"va": "top", "parse_math": False}  # a pair of $ in a name would start a formula
    percent = f"{100 * prob:.1f}%"
    axes.text(left + _IMAGE, top + 0.1, percent, fontsize=8, ha="right", color=_BLUE, **text)
    for line, words in enumerate(label.split("\n")):
        axes.text(left, top + 0.1 + line * _LINE, words, fontsize=8, weight="bold", **text)
    name = fitted_end(file_name(row.filename), 28)
    below = top + 0.1 + lines * _LINE + 0.01
    axes.text(left, below, name, fontsize=6, color="#555555", **text)
