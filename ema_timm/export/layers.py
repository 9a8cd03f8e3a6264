"""EMA layers as the exporters get them: weights folded and arranged, nothing left to work out."""

import copy

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.ops.export.delegated import arranged_for_delegates, delegated
from ema_timm.ops.export.exported import (
    ExportedWeights,
    SmallMap,
    arrange,
    exported,
    small_map,
)
from ema_timm.ops.export.in_place import exported_in_place
from ema_timm.ops.formula import fold
from ema_timm.ops.weights import EmaWeights

SMALL_PIXELS = {True: 256, False: 64}
"""Largest map, H·W, pooled by one matrix product where its size is fixed: in ONNX or not."""


class DelegatedEma(nn.Module):
    """One EMA layer for a mobile delegate, for one size of maps.

    Args:
        weights: Arranged weights, as `ExportedEma` has them.
        groups: G.
    """

    def __init__(self, weights: ExportedWeights, groups: int):
        super().__init__()
        self.groups = groups
        for name, value in arranged_for_delegates(weights)._asdict().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (B, C, H, W)."""
        weights = [getattr(self, name) for name in ExportedWeights._fields]
        return delegated(x, ExportedWeights(*weights), self.groups)


class ExportedEma(nn.Module):
    """One EMA layer for a file: arranged weights as buffers.

    Args:
        weights: Arranged weights.
        groups: G.
        small: Matrices of the one size of its maps, or None.
        size: H and W of its maps, for a graph that takes no other.
        in_place: Whether PyTorch itself will run it.
    """

    def __init__(
        self,
        weights: ExportedWeights,
        groups: int,
        small: SmallMap | None = None,
        size: tuple[int, int] | None = None,
        in_place: bool = False,
    ):
        super().__init__()
        self.groups = groups
        self.size = size
        self.in_place = in_place
        self.fixed = small is not None
        for name, value in weights._asdict().items():
            self.register_buffer(name, value)
        for name in SmallMap._fields:
            matrix = torch.empty(0) if small is None else getattr(small, name)
            self.register_buffer(name, matrix.to(weights.gn_weight))

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (B, C, H, W)."""
        weights = ExportedWeights(
            self.mix_weight,
            self.mix_bias,
            self.kernel,
            self.vote_weight,
            self.vote_bias,
            self.gn_weight,
            self.gn_bias,
        )
        small: SmallMap | None = None
        if self.fixed:
            small = SmallMap(self.pool, self.spread_h, self.spread_w)
        if self.in_place:
            return exported_in_place(x, weights, self.groups, small)
        return exported(x, weights, self.groups, small, self.size)


@torch.no_grad()
def ready_to_export(
    model: nn.Module,
    image: Tensor | None = None,
    onnx: bool = False,
    pytorch: bool = False,
    delegate: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose EMA layers are `ExportedEma`; the same function.

    Args:
        model: A network in inference mode.
        image: One input where its size is to be fixed, so that the sizes of all maps are known.
        onnx: Whether the copy becomes ONNX; runtimes differ in what is fast.
        pytorch: Whether PyTorch itself runs what it becomes: TorchScript or a program of
            ``torch.export``.
        delegate: Whether a delegate runs it at the size of its example: XNNPACK, by ExecuTorch.
    """
    sizes = {} if image is None else _map_sizes(model, image)
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, EmaAttn) and layer.cross_spatial and _computes_here(layer):
            size = sizes.get(name)
            small = small_map(*size) if size and size[0] * size[1] <= SMALL_PIXELS[onnx] else None
            # ONNX refuses other sizes; a traced network would take them, and be wrong.
            known = size if onnx else None
            weights, groups = _arranged(layer), layer.groups
            ready = (
                DelegatedEma(weights, groups)
                if delegate
                else ExportedEma(weights, groups, small, known, pytorch)
            ).eval()
            if name:
                model.set_submodule(name, ready)
            else:
                model = ready
    return model


def _computes_here(layer: EmaAttn) -> bool:
    """Whether the layer computes as `EmaAttn` does, and not by a subclass's own arrangement."""
    return type(layer).forward is EmaAttn.forward


def _arranged(layer: EmaAttn) -> ExportedWeights:
    """Worked out in float64, in the type of the statistics."""
    weights = layer.weights()
    folded = fold(EmaWeights(*[w.double() for w in weights]))
    kind = torch.promote_types(weights.gn_weight.dtype, torch.float32)
    return ExportedWeights(*[w.to(kind).contiguous() for w in arrange(folded)])


def _map_sizes(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """(H, W) of the maps of every EMA layer that sees but one size."""
    seen: dict[str, set] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, EmaAttn):
            found = seen.setdefault(name, set())
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda module, args, found=found: found.add(tuple(args[0].shape[2:]))
                )
            )
    model(image)
    for hook in hooks:
        hook.remove()
    return {name: found.pop() for name, found in seen.items() if len(found) == 1}
