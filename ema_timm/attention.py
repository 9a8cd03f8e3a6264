"""The layer: parameters, validation and initialisation. Its forward is one call into ops."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ema_timm.children import REMEDY, call_children, obstacle, plain_weights
from ema_timm.hooks import guard_hooks
from ema_timm.ops import EmaWeights, ema_attention
from ema_timm.ops.dispatch import require_implementation
from ema_timm.ops.macs import closed_form_macs, parallel_macs
from ema_timm.ops.weights import EPS
from ema_timm.pasted import FOLDED, adapted_state, loading_errors

# Symbolic tracers (torch.fx, timm's and torchvision's feature extraction) keep the operator
# whole: its validation reads shapes, which a proxy does not have.
torch.fx.wrap("ema_attention")

DEFAULT_GROUPS = 32
"""The paper's `factor`, in every experiment."""


def largest_group_count(channels: int, at_most: int = DEFAULT_GROUPS) -> int:
    """The number of groups that the models use: the largest divisor not above ``at_most``.

    The paper's 32 divides most widths of ResNets and MobileNetV2s, and is then the result. Other
    widths get fewer groups: the 432 channels of mobilenetv2_075 get 27. The package has no other
    such rule.

    Args:
        channels: C, at least 1.
        at_most: Upper bound for the number of groups, at least 1.
    """
    _require_positive_int("channels", channels)
    _require_positive_int("groups", at_most)
    return next(g for g in range(min(at_most, channels), 0, -1) if channels % g == 0)


class EmaAttn(nn.Module):
    """Efficient Multi-scale Attention ("EMA attention"; not an exponential moving average).

    The channels are split into G groups of n = C / G. Each group gets one gate map
    A = sigmoid(L) of H × W, made of two branches: gates along height and width (a shared 1×1
    convolution of pooled rows and columns) and a 3×3 convolution. The output is ``x`` times that
    map. All groups share one set of 10 n² + 4 n parameters.

    Source: Ouyang et al., "Efficient Multi-Scale Attention Module with Cross-Spatial Learning",
    ICASSP 2023, arXiv:2305.13563. State-dict keys are those of the authors' module, so its
    weights load with ``strict=True``.

    `set_implementation` changes the implementation of a model's layers. Its choice "fused", Triton
    kernels, is experimental until it has been timed on a GPU.

    A child that is wrapped or hooked (LoRA, pruning, ``weight_norm``) works as in any other module:
    the layer then calls its children, which is slower; see `ema_timm.children`.

    Args:
        channels: C, the width of the feature map.
        groups: G, the paper's ``factor``; must divide ``channels``. By default the largest divisor
            up to 32.
        factor: Another name of ``groups``, which the authors' code has.
        cross_spatial: False is the paper's ablation, without cross-spatial learning: both
            branches are added and each channel keeps its own gate map. The same parameters;
            `ema_timm.ops.parallel` has the formula.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If ``groups`` does not divide ``channels`` or either is below 1.
        TypeError: If either is not an int, both ``groups`` and ``factor`` are given, or
            ``cross_spatial`` is not a bool.
    """

    def __init__(
        self,
        channels: int,
        *,  # a pasted EMA(c1, c2) must not become c2 groups
        groups: int | None = None,
        factor: int | None = None,
        cross_spatial: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = _chosen_groups(channels, groups, factor)
        if not isinstance(cross_spatial, bool):
            raise TypeError(f"cross_spatial must be True or False, got {cross_spatial!r}.")
        n = channels // groups
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = channels
        self.groups = groups
        self.cross_spatial = cross_spatial
        self.impl = "auto"
        self.conv1x1 = nn.Conv2d(n, n, kernel_size=1, **dd)
        self.conv3x3 = nn.Conv2d(n, n, kernel_size=3, padding=1, **dd)
        self.gn = nn.GroupNorm(n, n, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``.

        Args:
            x: Feature map, (B, C, H, W), floating point.

        Returns:
            (B, C, H, W), the dtype and memory format of ``x``.
        """
        return self.gated(x)

    def gated(self, x: Tensor) -> Tensor:
        """What `forward` returns, for subclasses: TorchScript does not compile ``super()``."""
        if torch.jit.is_scripting():
            return ema_attention(x, self.weights(), self.groups, self.impl, self.cross_spatial)
        else:  # the script compiler does not read this branch
            weights = plain_weights(self)
            if weights is None:
                return call_children(self, x)
            return ema_attention(x, weights, self.groups, self.impl, self.cross_spatial)

    def weights(self) -> EmaWeights:
        """The current parameters, in the form that `ema_attention` expects.

        Raises:
            RuntimeError: If a child is wrapped or hooked, because the parameters are then not all
                that the layer computes with.
        """
        if not torch.jit.is_scripting():
            self._require_plain("Reading its weights")
        mix_bias, conv_bias = self.conv1x1.bias, self.conv3x3.bias
        # TorchScript types a convolution's bias as optional; ours always have one.
        assert mix_bias is not None and conv_bias is not None
        return EmaWeights(
            self.conv1x1.weight,
            mix_bias,
            self.conv3x3.weight,
            conv_bias,
            self.gn.weight,
            self.gn.bias,
        )

    def _require_plain(self, purpose: str) -> None:
        if reason := obstacle(self):
            raise RuntimeError(
                f"This EMA attention layer calls its children, because {reason}. {purpose} would "
                f"leave that out. {REMEDY}"
            )

    def __prepare_scriptable__(self) -> "EmaAttn":
        """Refuse a layer whose script would leave out what wraps or hooks its children."""
        self._require_plain("Scripting it")
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state if "impl" in state else adapted_state(state, EmaAttn))
        guard_hooks()  # a hook may run it, which pickle sets up without a call of `attach`

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        rest[-1].extend(loading_errors(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def macs(self, batch: int, height: int, width: int) -> int:
        """Multiply-accumulates of one call, as `ema_timm.ops.macs` counts them.

        Args:
            batch: B.
            height: H.
            width: W.
        """
        count = closed_form_macs if self.cross_spatial else parallel_macs
        return count(batch * self.groups, self.channels // self.groups, height, width)

    def extra_repr(self) -> str:
        """The arguments that ``print`` shows after the class name."""
        ablation = "" if self.cross_spatial else ", cross_spatial=False"
        return f"channels={self.channels}, groups={self.groups}{ablation}"


def set_implementation(model: nn.Module, impl: str) -> int:
    """Set the implementation used by every EMA attention layer in ``model``.

    Args:
        model: Any module that contains layers, or one layer.
        impl: "auto", "reference", "closed_form" or "fused" (Triton kernels: experimental until
            they have been timed on a GPU).

    Returns:
        The number of layers.

    Raises:
        ValueError: If ``impl`` is unknown, if the model contains no such layer, or if ``impl`` is
            not "auto" and a layer has no cross-spatial learning.
    """
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    require_implementation(impl, all(layer.cross_spatial for layer in layers))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no EMA attention layer. Give the model that contains "
            "the layers."
        )
    for layer in layers:
        layer.impl = impl
    return len(layers)


def layer_types(model: nn.Module | None = None) -> list[type[EmaAttn]]:
    """`EmaAttn` and its subclasses, for tools that look layers up by their exact type.

    Args:
        model: The network that holds the layers; None stands for every subclass that is imported.
    """
    if model is not None:
        return list({EmaAttn, *(type(m) for m in model.modules() if isinstance(m, EmaAttn))})
    found: list[type[EmaAttn]] = [EmaAttn]
    for kind in found:  # it grows
        found += kind.__subclasses__()
    return found


def _chosen_groups(channels: int, groups: int | None, factor: int | None) -> int:
    if groups is not None and factor is not None:
        raise TypeError(
            f"groups and factor are two names of one number, got groups={groups} and "
            f"factor={factor}. Give groups."
        )
    groups = factor if groups is None else groups
    if groups is None:
        return largest_group_count(channels)
    _require_positive_int("channels", channels)
    _require_positive_int("groups", groups)
    if channels % groups:
        raise ValueError(
            f"groups must divide channels: {channels} channels cannot be split into {groups} "
            f"groups. Use groups={largest_group_count(channels, groups)}, or leave groups out."
        )
    return groups


def _require_positive_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str):
        if name == "FoldedEma":  # the class that a pickle of a folded layer needs
            # Not an AttributeError, because pickle would replace its message.
            raise RuntimeError(f"The parameters of FoldedEma are {FOLDED}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
