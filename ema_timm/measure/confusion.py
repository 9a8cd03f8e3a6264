"""Which classes a classifier takes for which, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from torch import Tensor

_NAMED = 30
"""Up to so many classes the axes carry names, and the cells their counts."""


def save_confusion(confusion: Tensor, names: list[str], path: str | Path) -> None:
    """Draw a confusion matrix; every row is coloured by its part of the class.

    Args:
        confusion: Counts of images by (target, predicted), (classes, classes).
        names: Class names in the order of the indices.
        path: PNG file to write.
    """
    classes = len(names)
    inches = min(3.0 + 0.42 * classes, 12.0)
    figure = Figure(figsize=(inches + 0.6, inches), layout="constrained")
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="part of the images of the class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    if classes > _NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    else:
        shown = _shown(names)
        axes.set_xticks(range(classes), shown, rotation=90)
        axes.set_yticks(range(classes), shown)
        for row, column in confusion.nonzero().tolist():
            dark = share[row, column] > 0.5
            axes.text(
                column,
                row,
                str(int(confusion[row, column])),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    correct, images = int(confusion.diagonal().sum()), int(confusion.sum())
    axes.set_title(f"{correct} of {images} images on the diagonal", fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def _shown(names: list[str]) -> list[str]:
    """Names as matplotlib can draw them; numbers where its font lacks their letters."""
    font = get_font(findfont(FontProperties()))
    if not all(font.get_char_index(ord(letter)) for name in names for letter in name):
        return [str(index) for index in range(len(names))]
    return [name[:24].replace("$", r"\$") for name in names]  # a pair of $ would be mathematics
