"""Pretrained weights for tests that load them, without network: a stand-in for the Hub's cache.

timm's tests of pretrained loading fetch a file from the Hub. Here each repository is a folder of
the cache with the plain network's weights at random, in the file the Hub would have sent; how timm
finds, reads, converts and adapts it stays as it is.
"""

import os
import shutil
from pathlib import Path

import timm
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from ema_timm.files import sha256

REVISION = "0" * 40


class StandInHub:
    """A Hugging Face cache in ``folder``, in use from the first file that it provides.

    Args:
        folder: Where the cache is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.weights: tuple | None = None

    def provide(self, name: str, plain: str) -> None:
        """Make the file that ``name`` loads.

        Args:
            name: A registered name with a tag that has weights.
            plain: The plain network, whose weights the file holds.
        """
        constants.HF_HUB_OFFLINE = True
        constants.HF_HUB_CACHE = str(self.folder)
        cfg = get_pretrained_cfg(name)
        repository, _, _ = cfg.hf_hub_id.partition("@")
        place = self.folder / f"models--{repository.rstrip('/').replace('/', '--')}"
        file = place / "snapshots" / REVISION / "model.safetensors"
        if file.is_file():
            return
        weights = self._weights(plain, cfg.num_classes)
        file.parent.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(REVISION)
        blob = place / "blobs" / sha256(weights)  # the cache names content by its digest
        blob.parent.mkdir()
        os.link(weights, blob)
        file.symlink_to(os.path.relpath(blob, file.parent))

    def _weights(self, plain: str, num_classes: int) -> Path:
        """A file of weights of ``plain``; the one of another network makes way for it."""
        if self.weights == (plain, num_classes):
            return self.folder / "weights"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        model = timm.create_model(plain, num_classes=num_classes)
        save_file(model.state_dict(), self.folder / "weights")
        self.weights = (plain, num_classes)
        return self.folder / "weights"
