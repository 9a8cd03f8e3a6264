"""EMA attention for torch-pruning: whole channel groups go, and the others compute what they did.

All groups share one set of parameters, so that a layer with fewer groups has the same ones.

    pruner = torch_pruning.pruner.BasePruner(
        model, image, whole_groups(torch_pruning.importance.MagnitudeImportance()),
        customized_pruners=pruners(model), ignored_layers=[model.get_classifier()],
    )
    step(pruner)
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ema_timm.attention import EmaAttn, layer_types


def pruners(model: nn.Module) -> dict[type, object]:
    """For ``customized_pruners`` of torch-pruning's pruners and of its DependencyGraph.

    Args:
        model: The network that is to be pruned.

    Raises:
        ValueError: If a layer has no cross-spatial learning. torch-pruning looks into the
            operators of such a layer and then takes all memory.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, EmaAttn) and not layer.cross_spatial:
            raise ValueError(
                f"{name} is an EMA layer without cross-spatial learning, which torch-pruning "
                "cannot prune. Build the network with cross_spatial=True."
            )
    from torch_pruning.pruner.function import BasePruningFunc

    class EmaPruner(BasePruningFunc):
        """Takes channel groups out of an `EmaAttn`, or of one of its subclasses."""

        def prune_out_channels(self, layer: EmaAttn, idxs: Sequence[int]) -> nn.Module:
            """Take the channels ``idxs`` out, whole groups of the layer in all."""
            return _without(layer, set(idxs))

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: EmaAttn) -> int:
            """C, which goes in and comes out."""
            return layer.channels

        get_in_channels = get_out_channels

    return dict.fromkeys(layer_types(model), EmaPruner())


def whole_groups(importance: Callable) -> Callable:
    """``importance`` with one value, the mean, for all channels of a group of an EMA layer.

    Args:
        importance: One of torch-pruning's, or another function from its groups to a vector.
    """

    def averaged(group, *rest, **options) -> Tensor | None:
        found = importance(group, *rest, **options)
        if found is None:
            return None
        for block in _blocks(group):
            found[block] = found[block].mean()
        return found

    return averaged


def step(pruner) -> None:
    """One step of ``pruner`` that leaves every EMA layer's groups whole.

    What torch-pruning chose goes, less the channels of groups that it would have cut: at most one
    group a layer with importances by `whole_groups`.

    Args:
        pruner: One of torch-pruning's, with `pruners`.
    """
    graph = pruner.DG
    for chosen in pruner.step(interactive=True):
        dep, idxs = chosen[0]
        module, function = dep.target.module, dep.handler
        size = pruner.DG.get_out_channels(module)
        if not pruner.DG.is_out_channel_pruning_fn(function):
            size = pruner.DG.get_in_channels(module)
        blocks = _blocks(graph.get_pruning_group(module, function, list(range(size))))
        cut = {i for block in blocks if not set(block) <= set(idxs) for i in block}
        whole = sorted(set(idxs) - cut)
        if whole:
            graph.get_pruning_group(module, function, whole).prune()


def _blocks(group) -> list[list[int]]:
    """Channels of the root of a torch-pruning group that an EMA layer holds in one group."""
    blocks: list[set[int]] = []
    for item in group:
        layer = item.dep.target.module
        if not isinstance(layer, EmaAttn):
            continue
        found: dict[int, set[int]] = {}
        n = layer.channels // layer.groups
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            found.setdefault(index // n, set()).add(root)
        for block in found.values():  # layers of other widths of groups may share the channels
            blocks = [block.union(*[b for b in blocks if b & block])] + [
                b for b in blocks if not b & block
            ]
    return [sorted(block) for block in blocks]


def _without(layer: EmaAttn, channels: set[int]) -> EmaAttn:
    n = layer.channels // layer.groups
    groups = {c // n for c in channels}
    if len(groups) * n != len(channels):
        raise ValueError(
            f"EMA attention loses whole groups of {n} channels, got {len(channels)} channels of "
            f"{len(groups)} groups. Prune by ema_timm.integrations.pruning.step(pruner)."
        )
    layer.channels -= len(channels)
    layer.groups -= len(groups)
    return layer
