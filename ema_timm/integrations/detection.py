"""Pretrained weights for the timm backbone of a detector, a segmenter or a transformers model.

Such networks build their backbone from a config, without weights; RT-DETR and D-FINE never load
any. `load_backbone_weights` loads them afterwards.
"""

from collections.abc import Mapping
from os import PathLike

import timm
import torch
from torch import Tensor, nn

_COUNTER = "num_batches_tracked"  # frozen norms of detectors do not have it


@torch.no_grad()
def load_backbone_weights(
    model: nn.Module, name: str, weights: str | PathLike | None = None
) -> list[str]:
    """Load pretrained weights into the timm backbone inside ``model``, in place.

    The backbone is recognised by its parameters: each has the name and shape of a parameter of the
    network ``name``, from the stem on. The backbone may lack later stages. The rest of ``model`` is
    not changed.

    Args:
        model: A network with a timm backbone, from transformers, torchvision,
            segmentation-models-pytorch or your own.
        name: The timm name that the backbone was built from, with a tag for other weights than the
            default; also ``hf-hub:USER/NAME`` and ``local-dir:FOLDER``.
        weights: A local file to load instead of downloading: weights of ``name``, or of the same
            network without EMA layers, which are then added by identity initialisation.

    Returns:
        The names of the submodules of ``model`` whose weights were loaded.

    Raises:
        ValueError: If ``model`` has no such backbone.
        RuntimeError: If timm does not know ``name`` or has no weights for it.
    """
    overlay = {"file": str(weights)} if weights else None
    if not overlay and ":" not in name and not timm.models.is_model_pretrained(name):
        raise RuntimeError(
            f"timm has no weights for {name!r}. Give a file as weights=, or a name from "
            "timm.list_pretrained()."
        )
    source = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and _is_backbone(module.state_dict(), source):
            found.append(path)
            own = {key: source[key] for key in module.state_dict() if key in source}
            module.load_state_dict(own)
    if not found:
        raise ValueError(
            f"weights of {name} fit a backbone built from the same name, but "
            f"{type(model).__name__} has none. Build it with that name and as many input channels, "
            "then load."
        )
    return found


def _is_backbone(state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is the network ``source`` from its first parameter on, or its first stages.

    A network with EMA layers has all parameters of the one without: blocks must have their layer.
    """
    if next(iter(source)) not in state:
        return False
    blocks = {key.rpartition(".")[0] for key in state}
    gated = {key.partition(".se.")[0] for key in source if ".se." in key}
    whole = all(
        any(key.startswith(f"{block}.se.") for key in state)
        for block in gated
        if any(name.startswith(f"{block}.") for name in blocks)
    )
    return whole and all(
        key in source and tensor.shape == source[key].shape
        for key, tensor in state.items()
        if not key.endswith(_COUNTER)
    )
