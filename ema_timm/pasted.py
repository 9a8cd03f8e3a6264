"""Pickles and weights of other classes: those that people pasted, and those of ema-timm 0.2.0.

A pasted class has the authors' children ``conv1x1``, ``conv3x3`` and ``gn``, so that its weights
load as they are, and some modules without weights (``softmax``, ``agp``, ``pool_h``, ``pool_w``).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ema_timm.children import KINDS

if TYPE_CHECKING:
    from ema_timm.attention import EmaAttn


def adapted_state(state: Mapping[str, Any], make: Callable[..., nn.Module]) -> dict[str, Any]:
    """The state of an `EmaAttn` from that of a pasted class, as pickles of whole models hold it.

    A pickle does not hold the code of the class: what its forward did differently is lost.

    Args:
        state: The ``__dict__`` of an instance of the pasted class. What it has beside the layer,
            such as a detector's number of the row, stays.
        make: `EmaAttn`.

    Raises:
        RuntimeError: If the children are not those of EMA attention.
    """
    children = state.get("_modules", {})
    groups = next((state[name] for name in _GROUPS if name in state), None)
    if not children.keys() >= KINDS.keys() or type(groups) is not int:
        raise RuntimeError(
            "This pickle is not of an EMA attention class: expected the number groups and the "
            f"modules {', '.join(KINDS)}, got {_listed(state, children)}. {_KEEP}"
        )
    channels = groups * children["gn"].num_channels
    like = make(channels, groups=groups, device="meta")
    wrong = [
        f"{name} is {child}, expected {like.get_submodule(name)}"
        for name, child in children.items()
        if name in KINDS and _described(child) != str(like.get_submodule(name))
    ]
    wrong += [f"{k} has weights" for k, m in children.items() if k not in KINDS and _has_weights(m)]
    if wrong:
        raise RuntimeError(
            f"This pickle is of an EMA class that computes something else: {', '.join(wrong)}. "
            f"{_KEEP}"
        )
    own = {key: vars(like)[key] for key in ("channels", "groups", "cross_spatial", "impl")}
    return {**state, **own, "_modules": {name: children[name] for name in KINDS}}


def loading_errors(
    layer: "EmaAttn", state_dict: Mapping[str, Tensor], prefix: str
) -> Iterator[str]:
    """The error for weights of the same width with another number of groups.

    Args:
        layer: An `EmaAttn`.
        state_dict: Weights that are about to be loaded.
        prefix: The name of the layer in them, with a dot at its end, or empty.

    Raises:
        RuntimeError: If the weights are those of a folded layer.
    """
    name = prefix.rstrip(".") or "this layer"
    if any(key.startswith(f"{prefix}folded.") for key in state_dict):
        raise RuntimeError(f"The weights of {name} are {FOLDED}")
    weight = state_dict.get(f"{prefix}conv1x1.weight")
    n, found = layer.channels // layer.groups, len(weight) if weight is not None else 0
    if found and found != n and layer.channels % found == 0:
        groups = layer.channels // found
        yield (
            f"{name}: the file has {groups} groups (conv1x1 is "
            f"{found}×{found}), the layer has {layer.groups} ({n}×{n}). Build the layer with "
            f"groups={groups}."
        )


def _described(child: nn.Module) -> str:
    """How `print` shows a child; "same" is how PyTorch also spells a padding of 1 of a 3×3."""
    padding = ", padding=(1, 1)" if getattr(child, "kernel_size", None) == (3, 3) else ""
    return str(child).replace(", padding=same", padding)


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and bool(module.state_dict())


def _listed(state: Mapping[str, Any], children: Mapping[str, Any]) -> str:
    names = [*children, *(key for key in state if not key.startswith("_") and key != "training")]
    return ", ".join(names) or "none of them"


FOLDED = (
    "those of a folded EMA layer, which ema-timm 0.2.0 made with reparameterize() and later "
    "versions do not have. Folding cannot be undone. Load the checkpoint that was saved before it."
)
_GROUPS = ("groups", "num_groups", "group", "factor")
"""Names that pasted classes give to the number of groups."""

_KEEP = "Keep the class that it was made from."
