"""The checkpoint folder of a run: the weights of its best epoch, and what is known of them."""

import dataclasses
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ema_timm.backbones.complexity import count_parameters
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import WEIGHTS
from ema_timm.checkpoints.preprocessing import PREPROCESSING
from ema_timm.checkpoints.results import FORMAT, hide_local_paths
from ema_timm.data.named import public_dataset_name
from ema_timm.environment import versions
from ema_timm.files import sha256
from ema_timm.measure.metrics import Metrics
from ema_timm.training.history import History
from ema_timm.training.network import Network
from ema_timm.training.processes import Process
from ema_timm.training.settings import FinetuneConfig

try:
    from ema_timm.training.checkpoint import save_curves
except ImportError:  # matplotlib is an extra; the run says so when it starts
    save_curves = None

PLOTS = [] if save_curves is None else ["curves.png"]
"""The pictures that a run draws."""


class RunCheckpoint:
    """The checkpoint that a run writes.

    Args:
        config: The run's settings.
        network: Its network.
        data: What identifies its images.
        process: This process.
        class_weights: Weights of the classes in its loss.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        network: Network,
        data: dict,
        process: Process,
        class_weights: list[float] | None = None,
    ):
        self.class_weights = class_weights
        self.config, self.network, self.data, self.process = config, network, data, process
        self.folder = CheckpointWriter(config.output)

    def save(self, history: History, improved: bool) -> None:
        """Write the folder after an epoch; its weights where the epoch was the best so far."""
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
        self.folder.write_json("results.json", results)
        self.folder.write_text("README.md", card_text(results))
        if save_curves is not None:
            self.folder.write("curves.png", lambda path: save_curves(history.entries, path))

    def holds(self, entry: dict) -> bool:
        """Whether the weights in the folder are those of ``entry``."""
        weights = self.folder.path / WEIGHTS
        return weights.is_file() and sha256(weights) == entry["weights_sha256"]

    def results(self, history: History) -> dict:
        """The content of results.json; the digest of the weights in the main process alone."""
        network, best = self.network, history.best
        return {
            "format": FORMAT,
            "architecture": network.model.pretrained_cfg["architecture"],
            "base": network.base,
            "task": "image-classification",
            "metrics": {key: best[key] for key in Metrics._fields},
            "best_epoch": best["epoch"],
            "weights_sha256": best["weights_sha256"] if self.process.main else None,
            "parameters": count_parameters(network.model),
            "macs": network.macs,
            "classes": network.classes,
            "input": {key: network.preprocessing[key] for key in PREPROCESSING},
            "data": self.data,
            "arguments": public_arguments(self.config),
            "history": history.entries,
            **self._where_there_are(history),
            "plots": PLOTS,
            "device": str(self.process.device.type),
            "processes": self.process.count,
            "versions": versions(),
        }

    def _where_there_are(self, history: History) -> dict:
        """Keys of results.json that not every run has."""
        epoch, patience = history.entries[-1]["epoch"], self.config.patience
        early = history.stalled(patience) and epoch < self.config.epochs
        weights, names = self.class_weights, self.network.classes
        found = {
            "extended_after": history.extended,
            "stopped_early": {"epoch": epoch, "patience": patience} if early else None,
            "class_weights": dict(zip(names, weights, strict=True)) if weights else None,
        }
        return {key: value for key, value in found.items() if value}


def public_arguments(config: FinetuneConfig) -> dict:
    """All settings, for results that are published: names of folders, not where they are."""
    public = hide_local_paths(dataclasses.asdict(config))
    return {**public, "dataset": public_dataset_name(config.dataset)}


# MERGED: Loss and accuracy over the epochs of a run, as a picture.
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
