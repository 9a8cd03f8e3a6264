"""Whether a network has got the weights that its start names: timm loads what fits, and goes on."""

from pathlib import Path

import torch
from timm.models import load_state_dict
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_timm.attention import EmaAttn
from ema_timm.backbones.slots import slot_layers
from ema_timm.checkpoints.layout import WEIGHTS
from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import UserError, some

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def check_start(model: nn.Module, blank: nn.Module, source: str) -> None:
    """Refuse a network that kept a part of its random start beside head and EMA layers.

    Where the head has other classes timm loads names that fit and tells nobody of the rest. What
    it maps, folds or adapts on the way is its own; so not names are compared but what came of it.

    Args:
        model: The network, with what was loaded into it.
        blank: The same from the same random numbers, with nothing loaded.
        source: What the weights are called, for what is said of them.

    Raises:
        UserError: With how many tensors were not given, and names of both sides.
    """
    random = {name: start for name, start in _body(blank).items() if _varies(start)}
    loaded = dict(model.named_parameters())
    kept = [name for name, start in random.items() if torch.equal(loaded[name], start)]
    if not kept:
        return
    names = sorted(_names(model), key=lambda name: (not name.endswith("weight"), name))
    holds = f"; it holds {some(names, 3)}" if names else ""
    raise UserError(
        f"{source} is no start for {model.pretrained_cfg['architecture']}: {len(kept)} of "
        f"{len(random)} weights beside head and EMA layers are not in it ({some(kept, 3)}){holds}. "
        "Map its names onto timm's with ema-timm convert, or start from none with --no-pretrained."
    )


def check_folder(folder: Path) -> None:
    """Bound what a ``local-dir:`` folder claims to hold, as every other start is.

    Raises:
        UserError: If a file that timm may take claims more than it is.
    """
    weights = folder / WEIGHTS
    others = sorted(f for f in folder.glob("*") if f.suffix in _SUFFIXES)
    for file in [weights] if weights.exists() else others:
        check_bounds(file)


def head_and_attention(model: nn.Module) -> set[str]:
    """Names of the parameters that no plain network's weights give.

    Those of the classifier, of EMA layers, and of whatever else stands in the slots of a network
    of ours (``attn="se"``).
    """
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    own = [*heads, *(module for module in model.modules() if isinstance(module, EmaAttn))]
    if model.pretrained_cfg["architecture"].endswith("_ema"):
        own += slot_layers(model)
    ids = {id(parameter) for module in own for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def _body(model: nn.Module) -> dict[str, Tensor]:
    """What the weights of a start must give: learned, and not of head or EMA layers."""
    own = head_and_attention(model)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and n not in own}


def _varies(start: Tensor) -> bool:
    """Whether a start is drawn: one that is the same number all over may be the given one too."""
    return start.numel() > 1 and bool((start != start.flatten()[0]).any())


def _names(model: nn.Module) -> set[str]:
    """The names in the file or folder that was loaded; none where it is another source."""
    file = model.pretrained_cfg.get("file")
    if not file:
        return set()
    path = Path(file)
    return set(load_state_dict_from_path(path) if path.is_dir() else load_state_dict(str(path)))


# MERGED: The backbone kept as it is for the first epochs, while head and EMA layers learn.
class Backbone:
    """All of a network that its start has given: neither head nor EMA layers.

    timm's `freeze` and `unfreeze` put new batch-norm layers into the network, whose parameters
    the optimiser would not know, and let everything learn in the end, also what never does.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        own = head_and_attention(model)
        self.parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in own
        ]
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """Keep it from learning, or let it."""
        self.frozen = frozen
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)

    def train(self) -> None:
        """After the network was put into training mode: keep the statistics of a frozen one."""
        if self.frozen:
            for norm in self.norms:
                norm.eval()
