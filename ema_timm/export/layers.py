"""EMA layers replaced by modules that are ready for an exporter: their weights are folded."""

import copy

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.ops.export.dialects import DIALECTS, Delegate, ExportedEma
from ema_timm.ops.export.weights import ExportedWeights, arrange, small_map
from ema_timm.ops.formula import fold
from ema_timm.ops.weights import EmaWeights


@torch.no_grad()
def ready_to_export(
    model: nn.Module, dialect: str = "plain", image: Tensor | None = None
) -> nn.Module:
    """Copy ``model``, with `ExportedEma` in the place of its EMA layers; the outputs are the same.

    Layers without cross-spatial learning, and subclasses of `EmaAttn` with a forward of their own,
    are copied as they are.

    Args:
        model: A network in inference mode, or one layer.
        dialect: Who runs the result. Each dialect computes the same in the operators that suit:
            "plain" (OpenVINO, and any other converter), "onnx", "pytorch" (TorchScript and
            ``torch.export``) or "delegate" (XNNPACK by ExecuTorch, for the size of the example).
        image: An input, if the size of images is fixed; the sizes of all maps are then known.

    Raises:
        ValueError: If there is no such dialect.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect must be one of {tuple(DIALECTS)}, got {dialect!r}.")
    sizes = {} if image is None else _map_sizes(model, image)
    ready = {
        layer: _ready(layer, dialect, sizes.get(layer))
        for layer in model.modules()
        if isinstance(layer, EmaAttn) and layer.cross_spatial and _computes_here(layer)
    }
    if model in ready:
        return ready[model]
    # Listed first, since replacing changes the list; with duplicates, since layers may be shared.
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in ready]
    model = copy.deepcopy(model)
    for name, layer in places:
        model.set_submodule(name, ready[layer])
    return model


def _computes_here(layer: EmaAttn) -> bool:
    """Whether the layer computes as `EmaAttn` does, and not as a subclass defines it."""
    return type(layer).forward is EmaAttn.forward


def _ready(layer: EmaAttn, dialect: str, size: tuple[int, int] | None) -> ExportedEma:
    weights, kind = _arranged(layer), DIALECTS[dialect]
    if kind is Delegate:  # supports one size anyway, and pools without matrices
        return ExportedEma(weights, layer.groups, dialect).eval()
    few = size is not None and size[0] * size[1] <= kind.SMALL_PIXELS
    small = small_map(*size) if few else None
    # ONNX rejects other sizes; a traced network would accept them and be wrong.
    known = size if dialect == "onnx" else None
    return ExportedEma(weights, layer.groups, dialect, small, known).eval()


def _arranged(layer: EmaAttn) -> ExportedWeights:
    """The layer's weights, computed in float64, in the type of the statistics."""
    weights = layer.weights()
    kind = torch.promote_types(weights.gn_weight.dtype, torch.float32)
    arranged = arrange(fold(EmaWeights(*[w.double() for w in weights])))
    return ExportedWeights(*[w.to(kind, copy=True).contiguous() for w in arranged])


def _map_sizes(model: nn.Module, image: Tensor) -> dict[nn.Module, tuple[int, int]]:
    """(H, W) of the maps of each EMA layer whose maps have only one size."""
    seen: dict[nn.Module, set[tuple[int, int]]] = {}
    hooks = []
    for layer in model.modules():
        if isinstance(layer, EmaAttn):
            found = seen.setdefault(layer, set())
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda module, args, found=found: found.add(tuple(args[0].shape[2:]))
                )
            )
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: found.pop() for layer, found in seen.items() if len(found) == 1}
