"""The confusion matrix of a classifier, as a figure."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ema_timm.figures import drawable

_NAMED = 30
"""Most classes whose names are on the axes, with their counts in the cells."""


def save_confusion(confusion: Tensor, names: list[str], path: str | Path) -> None:
    """Draw a confusion matrix. A cell's colour is its part of the row.

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
    """Names as matplotlib can draw them; numbers if its font lacks one of their characters."""
    if not all(map(drawable, names)):
        return [str(index) for index in range(len(names))]
    return [name[:24].replace("$", r"\$") for name in names]  # a pair of $ would be mathematics
