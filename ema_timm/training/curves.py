"""Loss and accuracy over the epochs of a run, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def save_curves(history: list[dict], path: str | Path) -> None:
    """Draw training and validation loss beside top-1 accuracy.

    Args:
        history: One entry an epoch, with epoch, train_loss, loss and top1.
        path: PNG file to write.
    """
    epochs = [entry["epoch"] for entry in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = {"marker": "o", "markersize": 3}
    left.plot(
        epochs, [entry["train_loss"] for entry in history], label="training, as optimised", **marker
    )
    left.plot(epochs, [entry["loss"] for entry in history], label="validation", **marker)
    left.set_ylabel("loss (cross-entropy)")
    left.legend()
    right.plot(epochs, [entry["top1"] for entry in history], color="tab:green", **marker)
    best = max(history, key=lambda entry: entry["top1"])
    right.axhline(best["top1"], linestyle=":", color="grey")
    right.set_title(f"best {best['top1']:.2f}% in epoch {best['epoch']}", fontsize=10)
    right.set_ylabel(f"top-1 accuracy (%), {best['images']} images")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
