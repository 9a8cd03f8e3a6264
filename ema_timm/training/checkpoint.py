"""The checkpoint folder of a run: the weights of its best epoch, its results, card and curves."""

from importlib.util import find_spec
from pathlib import Path

from ema_timm.backbones.complexity import count_parameters
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import CARD, RESULTS, WEIGHTS
from ema_timm.checkpoints.preprocessing import PREPROCESSING
from ema_timm.checkpoints.results import FORMAT, hide_local_paths
from ema_timm.data.named import public_dataset_name
from ema_timm.environment import versions
from ema_timm.files import sha256
from ema_timm.measure.metrics import Metrics
from ema_timm.training.history import History
from ema_timm.training.network import RunNetwork
from ema_timm.training.processes import Process

CURVES = "curves.png"
DRAWS_CURVES = find_spec("matplotlib") is not None
"""matplotlib is an extra. Without it the run has no curves, and says so when it starts."""


class RunCheckpoint:
    """The checkpoint folder that a run writes.

    Args:
        arguments: All settings of the run, by name.
        network: Its network.
        data: Number and fingerprint of its images.
        process: This process.
        class_weights: Weights of the classes in its loss.
        identical: Number of its validation images that are training images too.
    """

    def __init__(
        self,
        arguments: dict,
        network: RunNetwork,
        data: dict,
        process: Process,
        class_weights: list[float] | None = None,
        identical: int = 0,
    ):
        self.arguments, self.network, self.data = arguments, network, data
        self.process, self.class_weights, self.identical = process, class_weights, identical
        self.folder = CheckpointWriter(arguments["output"])

    def save(self, history: History, improved: bool) -> None:
        """Write the folder after an epoch, with new weights if the epoch is the best so far."""
        if improved:
            network = self.network
            history.best["weights_sha256"] = self.folder.save_model(
                network.model,
                network.args,
                network.preprocessing,
                network.classes,
                network.descriptions,
            )
        results = self.results(history)
        self.folder.write_json(RESULTS, results)
        self.folder.write_text(CARD, card_text(results))
        if DRAWS_CURVES:
            self.folder.write(CURVES, lambda path: save_curves(history.entries, path))

    def holds(self, entry: dict) -> bool:
        """Whether the weights in the folder are those of ``entry``."""
        weights = self.folder.path / WEIGHTS
        return weights.is_file() and sha256(weights) == entry["weights_sha256"]

    def results(self, history: History) -> dict:
        """The content of results.json. Only the main process knows the hash of the weights."""
        network, best = self.network, history.best
        return {
            "format": FORMAT,
            "architecture": network.model.pretrained_cfg["architecture"],
            "base": network.base,
            "task": "image-classification",
            "metrics": {key: best[key] for key in Metrics._fields if key in best},
            "best_epoch": best["epoch"],
            "weights_sha256": best["weights_sha256"] if self.process.main else None,
            "parameters": count_parameters(network.model),
            "macs": network.macs,
            "classes": network.classes,
            "input": {key: network.preprocessing[key] for key in PREPROCESSING},
            "data": self.data,
            "arguments": public_arguments(self.arguments),
            "history": history.entries,
            **self._optional_results(history),
            "plots": [CURVES] if DRAWS_CURVES else [],
            "device": str(self.process.device.type),
            "processes": self.process.count,
            "versions": versions(),
        }

    def _optional_results(self, history: History) -> dict:
        """Entries of results.json that only some runs have."""
        epoch, patience = history.entries[-1]["epoch"], self.arguments["patience"]
        early = history.stalled(patience) and epoch < self.arguments["epochs"]
        weights, names = self.class_weights, self.network.classes
        entries = {
            "extended_after": history.extended,
            "stopped_early": {"epoch": epoch, "patience": patience} if early else None,
            "class_weights": dict(zip(names, weights, strict=True)) if weights else None,
            "identical_images": self.identical,
        }
        return {key: value for key, value in entries.items() if value}


def public_arguments(arguments: dict) -> dict:
    """All settings of a run as they are published: names of folders instead of their paths."""
    public = hide_local_paths(arguments)
    return {**public, "dataset": public_dataset_name(arguments["dataset"])}


def save_curves(history: list[dict], path: str | Path) -> None:
    """Draw training and validation loss next to top-1 accuracy.

    Args:
        history: One entry for each epoch, with epoch, train_loss, loss and top1.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
