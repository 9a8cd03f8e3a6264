"""The weights that a run starts from: found, checked, and frozen for the first epochs."""

from pathlib import Path
from typing import NamedTuple

import torch
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained, load_state_dict
from timm.models._factory import parse_model_name
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_timm.attention import EmaAttn
from ema_timm.backbones.rebuild import weights_name
from ema_timm.backbones.slots import slot_layers
from ema_timm.checkpoints.layout import WEIGHTS
from ema_timm.checkpoints.results import public_model_name
from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import UserError, some
from ema_timm.files import sha256
from ema_timm.hub.fetch import fetch

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class InitialModel(NamedTuple):
    """The network and the weights that a run starts from, as its settings name them.

    Args:
        name: timm model name; also ``hf-hub:USER/NAME`` and ``local-dir:FOLDER``.
        kwargs: Arguments of the model.
        pretrained: Load weights; None loads them if the name has some.
        weights: Load this file instead of the weights of the name.
    """

    name: str
    kwargs: dict
    pretrained: bool | None = None
    weights: str = ""

    @property
    def loads_weights(self) -> bool:
        """Whether the run starts from given weights, not from random ones."""
        if self.pretrained is not None:
            return self.pretrained
        given = bool(self.weights) or ":" in self.name
        return given or is_model_pretrained(weights_name(self.name, self.kwargs))

    def config_overlay(self, load: bool) -> dict | None:
        """Entries of timm's pretrained configuration that name the weights file.

        Args:
            load: Fetch and check the file, because it will be loaded.

        Returns:
            None if timm finds the weights itself.
        """
        file = self.weights or (self._fetch() if load else None)
        if file and load:
            check_bounds(Path(file))
        return {"file": str(file), "source": ""} if file else None

    def _fetch(self) -> Path | None:
        """Fetch the weights file of the name from the Hub; None leaves it to timm."""
        source, model_id = parse_model_name(self.name)
        cache_dir = self.kwargs.get("cache_dir")
        if source == "hf-hub":
            return fetch(model_id, WEIGHTS, cache_dir)
        if source == "local-dir":
            check_weight_files(Path(model_id))
            return None
        model_id = weights_name(model_id, self.kwargs)
        if not is_model(model_id.partition(".")[0]) or "pretrained_cfg" in self.kwargs:
            return None
        cfg = get_pretrained_cfg(model_id)
        if cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename or cfg.custom_load or cfg.file:
            return None
        return fetch(cfg.hf_hub_id, WEIGHTS, cache_dir)

    def describe(self, model: nn.Module) -> dict:
        """The entry ``base`` of results.json: where the weights of ``model`` come from."""
        cfg = model.pretrained_cfg
        repository = None
        if not self.loads_weights:
            weights = "random start"
        elif self.weights or self.name.startswith("local-dir:"):
            weights = Path(self.weights or self.name.removeprefix("local-dir:")).name
        else:
            repository = cfg.get("hf_hub_id")
            weights = repository or cfg.get("url")
        return {
            "model": public_model_name(weights_name(self.name, self.kwargs)),
            "weights": weights,
            "hub_repository": repository,
            "license": cfg.get("license") if repository else None,
            "sha256": _file_sha256(cfg.get("file")) if self.loads_weights else None,
        }

    def check(self, model: nn.Module, blank: nn.Module) -> None:
        """Check that loading gave every weight outside the head and the EMA layers.

        If the number of classes differs, timm loads the names that match and ignores the others
        without a message. timm also renames, folds or adapts tensors while it loads, so this
        compares the loaded values, not the names.

        Args:
            model: The network with its loaded weights.
            blank: The same network, initialised from the same random numbers.

        Raises:
            UserError: If some weights kept their random values.
        """
        random = {name: start for name, start in _body(blank).items() if _varies(start)}
        loaded = dict(model.named_parameters())
        kept = [name for name, start in random.items() if torch.equal(loaded[name], start)]
        if not kept:
            return
        names = sorted(_names_in_file(model), key=lambda name: (not name.endswith("weight"), name))
        found = f"; it contains {some(names, 3)}" if names else ""
        source = f"--weights {self.weights}" if self.weights else self.name
        raise UserError(
            f"{source} does not fit {model.pretrained_cfg['architecture']}: {len(kept)} of "
            f"{len(random)} weights outside the head and the EMA layers are missing "
            f"({some(kept, 3)}){found}. Map its names to timm's names with ema-timm convert, or "
            "start from random weights with --no-pretrained."
        )


def _file_sha256(file: str | None) -> str | None:
    """The hash of a file of weights, or of model.safetensors in a folder; None without either."""
    path = Path(file or "")
    path = path / WEIGHTS if path.is_dir() else path
    return sha256(path) if path.is_file() else None


def check_weight_files(folder: Path) -> None:
    """Check the sizes that the weight files in a ``local-dir:`` folder declare.

    Raises:
        UserError: If a file that timm may load declares more than it holds.
    """
    weights = folder / WEIGHTS
    others = sorted(f for f in folder.glob("*") if f.suffix in _SUFFIXES)
    for file in [weights] if weights.exists() else others:
        check_bounds(file)


class Backbone:
    """The part of a network whose initial weights are given: all but the head and EMA layers.

    timm's `freeze` and `unfreeze` are not used: they replace the batch-norm layers, whose new
    parameters the optimiser would not know, and unfreeze parameters that never learn.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        self.parameters = list(_body(model).values())
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """Freeze or unfreeze the parameters."""
        self.frozen = frozen
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)

    def train(self) -> None:
        """Keep the statistics of a frozen network. Call this after ``model.train()``."""
        if self.frozen:
            for norm in self.norms:
                norm.eval()


def _body(model: nn.Module) -> dict[str, Tensor]:
    """The learned parameters outside the head and the attention layers, by name."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    own = [*heads, *(module for module in model.modules() if isinstance(module, EmaAttn))]
    if model.pretrained_cfg["architecture"].endswith("_ema"):
        own += slot_layers(model)  # other attention layers, as with attn="se"
    ids = {id(parameter) for module in own for parameter in module.parameters()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids}


def _varies(start: Tensor) -> bool:
    """Whether initial values are random. Given weights may equal constant ones by chance."""
    return start.numel() > 1 and bool((start != start.flatten()[0]).any())


def _names_in_file(model: nn.Module) -> set[str]:
    """The tensor names in the file or folder that was loaded; empty for another source."""
    file = model.pretrained_cfg.get("file")
    if not file:
        return set()
    path = Path(file)
    return set(load_state_dict_from_path(path) if path.is_dir() else load_state_dict(str(path)))
