"""What a run tells on stderr while it goes on."""

import sys

import torch
from tqdm.auto import tqdm

from ema_timm.training.checkpoint import PLOTS
from ema_timm.training.data import Images
from ema_timm.training.epoch import Position
from ema_timm.training.history import History
from ema_timm.training.network import Network
from ema_timm.training.settings import FinetuneConfig


class Log:
    """A line when the run starts, and one an epoch.

    Args:
        config: The run's settings.
        resumed: Whether the run continues.
        shown: Tell at all.
    """

    def __init__(self, config: FinetuneConfig, resumed: bool, shown: bool):
        self.config, self.resumed, self.shown = config, resumed, shown

    def start(
        self,
        network: Network,
        images: Images,
        device: torch.device,
        position: Position,
        history: History,
    ) -> None:
        """Tell what is trained, on what, and from where on."""
        if position == Position(history.first) and history.first:
            self._tell(
                f"the run of {history.first} epochs was finished: epochs {history.first + 1} to "
                f"{self.config.epochs} are a new run from its last weights, with a schedule of "
                "their own"
            )
        done = ""
        if self.resumed:
            done = f", from epoch {position.epoch + 1}, step {position.step + 1}"
        size = "×".join(map(str, network.preprocessing["input_size"][1:]))
        self._tell(
            f"{self.config.model} ({network.base['weights']}), {len(network.classes)} classes, "
            f"{len(images.train)} training and {len(images.val)} validation images at "
            f"{size}, on {device}{done}"
        )
        if not PLOTS:
            self._tell("no curves.png: matplotlib is missing (pip install 'ema-timm[train]')")

    def epoch(self, history: History) -> None:
        """Tell of the last epoch."""
        last = history.entries[-1]
        self._tell(
            f"epoch {last['epoch']}/{self.config.epochs}  train loss {last['train_loss']:.4f}  "
            f"top-1 {last['top1']:.2f}% of {last['images']} images  "
            f"(best {history.best['top1']:.2f}%)  {last['seconds']:.1f} s"
        )

    def stopped_early(self, history: History) -> None:
        """Tell that the run ended before its last epoch, and why."""
        self._tell(
            f"no epoch was better than {history.best['epoch']} in the last {self.config.patience}: "
            f"the run ends after {history.entries[-1]['epoch']} of {self.config.epochs}. --resume "
            "with more --patience goes on"
        )

    def _tell(self, line: str) -> None:
        if self.shown:
            tqdm.write(line, file=sys.stderr)
