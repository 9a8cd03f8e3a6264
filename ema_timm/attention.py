"""The layer: parameters, validation and initialisation. Its forward is one call into ops."""

import torch
from torch import Tensor, nn

from ema_timm.ops import EmaWeights, FoldedWeights, ema_attention, folded_ema_attention
from ema_timm.ops.dispatch import require_implementation
from ema_timm.ops.formula import drop_common_vote, fold
from ema_timm.ops.macs import closed_form_macs, parallel_macs
from ema_timm.ops.weights import EPS

# Symbolic tracers (torch.fx, timm's and torchvision's feature extraction) keep the operator
# whole: its validation reads shapes, which a proxy does not have.
torch.fx.wrap("ema_attention")
torch.fx.wrap("folded_ema_attention")

DEFAULT_GROUPS = 32
"""The paper's `factor`, in every experiment."""


def largest_group_count(channels: int, at_most: int = DEFAULT_GROUPS) -> int:
    """The number of groups the models use for a width: its largest divisor that is ``at_most``.

    The paper's 32 divides most widths of ResNets and MobileNetV2s and is then the answer. Where it
    does not (mobilenetv2_075's 432 channels, say, give 27) this rule takes its place; it is
    the only such rule in the package.

    Args:
        channels: C, at least 1.
        at_most: Upper bound for the number of groups, at least 1.
    """
    _require_positive_int("channels", channels)
    _require_positive_int("groups", at_most)
    return next(g for g in range(min(at_most, channels), 0, -1) if channels % g == 0)


class EmaAttn(nn.Module):
    """Efficient Multi-scale Attention ("EMA attention"; not an exponential moving average).

    The channels are split into G groups of n = C / G. In each group, gates along height and width
    (a shared 1×1 convolution of pooled rows and columns) and a 3×3 neighbourhood vote on one map
    A = sigmoid(L) of H × W, and the output is ``x`` times that map. All groups share one set of
    10 n² + 4 n parameters.

    Source: Ouyang et al., "Efficient Multi-Scale Attention Module with Cross-Spatial Learning",
    ICASSP 2023, arXiv:2305.13563. State-dict keys are those of the authors' module, so its
    weights load with ``strict=True``.

    Args:
        channels: C, the width of the feature map.
        groups: G, the paper's ``factor``; must divide ``channels``.
        cross_spatial: False is the paper's ablation, without cross-spatial learning: both
            branches are added and each channel keeps its own gate map. The same parameters;
            `ema_timm.ops.parallel` has the formula.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: If ``groups`` does not divide ``channels`` or either is below 1.
        TypeError: If either is not an int, or ``cross_spatial`` is not a bool.
    """

    def __init__(
        self,
        channels: int,
        groups: int = DEFAULT_GROUPS,
        cross_spatial: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_positive_int("channels", channels)
        _require_positive_int("groups", groups)
        if not isinstance(cross_spatial, bool):
            raise TypeError(f"cross_spatial must be True or False, got {cross_spatial!r}.")
        if channels % groups:
            raise ValueError(
                f"groups must divide channels: {channels} channels do not split into {groups} "
                f"groups. The nearest that works is "
                f"EmaAttn({channels}, groups={largest_group_count(channels, groups)})."
            )
        n = channels // groups
        dd = {"device": device, "dtype": dtype}
        self.channels = channels
        self.groups = groups
        self.cross_spatial = cross_spatial
        self.impl = "auto"
        self.folded = None
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
        if self.folded is not None:
            return self.folded(x)
        return ema_attention(x, self.weights(), self.groups, self.impl, self.cross_spatial)

    def reparameterize(self) -> None:
        """Fold all products of weights once, for inference; timm's ``--reparam`` calls this.

        The output stays the same. The parameters make way for those of `FoldedEma`, so the state
        dict has other keys (listed there) and one number fewer. Folding cannot be undone, and a
        checkpoint of the layer loads only before it: load first, then fold. A second call does
        nothing, and neither does the first without cross-spatial learning: no product of weights
        is left there to fold.
        """
        if self.folded is None and self.cross_spatial:
            self.folded = FoldedEma(self.weights(), self.groups, self.impl)
            self.folded.train(self.training)
            del self.conv1x1, self.conv3x3, self.gn

    def weights(self) -> EmaWeights:
        """The parameters as the operator takes them, read anew so that no update is missed."""
        conv1x1_bias, conv3x3_bias = self.conv1x1.bias, self.conv3x3.bias
        # TorchScript types a convolution's bias as optional; ours always have one.
        assert conv1x1_bias is not None and conv3x3_bias is not None
        return EmaWeights(
            self.conv1x1.weight,
            conv1x1_bias,
            self.conv3x3.weight,
            conv3x3_bias,
            self.gn.weight,
            self.gn.bias,
        )

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
        """What ``print`` shows beside the class name."""
        ablation = "" if self.cross_spatial else ", cross_spatial=False"
        return f"channels={self.channels}, groups={self.groups}{ablation}"


class FoldedEma(nn.Module):
    """The inference form of one `EmaAttn`: what depends on weights alone is worked out.

    State dict, n channels a group, no parameter of which requires gradients:

    - ``mix_weight`` (n, n), ``mix_bias`` (n,): the 1×1 convolution, unchanged.
    - ``kernel`` (9, n): the 3×3 convolution weighed by v = softmax(β), tap (dy, dx) in row
      3·(dy + 1) + dx + 1.
    - ``vote_weight`` (n - 1, 9n), ``vote_bias`` (n - 1,): the 3×3 convolution and its bias less
      their first output channel; they make u.
    - ``gn_weight`` (n,): γ. ``gn_bias`` (n,): β plus v·b₃.

    Inside a model the keys begin with the layer's name and ``folded.``.

    Args:
        weights: Parameters of the layer to fold.
        groups: G.
        impl: Who computes, as `ema_timm.ops.ema_attention` takes it.
    """

    def __init__(self, weights: EmaWeights, groups: int, impl: str = "auto"):
        super().__init__()
        self.groups = groups
        self.impl = impl
        with torch.no_grad():
            wide = drop_common_vote(fold(EmaWeights(*[w.double() for w in weights])))
        for name, value in wide._asdict().items():
            value = value.to(weights.gn_weight.dtype, copy=True).contiguous()
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, as `EmaAttn` does.

        Args:
            x: Feature map, (B, C, H, W), floating point.

        Returns:
            (B, C, H, W), the dtype and memory format of ``x``.
        """
        weights = FoldedWeights(
            self.mix_weight,
            self.mix_bias,
            self.kernel,
            self.vote_weight,
            self.vote_bias,
            self.gn_weight,
            self.gn_bias,
        )
        return folded_ema_attention(x, weights, self.groups, self.impl)


def set_implementation(model: nn.Module, impl: str) -> int:
    """Set the implementation used by every EMA attention layer in ``model``.

    "fused" is experimental: it has never run on a GPU.

    Args:
        model: Any module that holds layers, or one layer.
        impl: "auto", "reference", "closed_form" or "fused".

    Returns:
        The number of layers.

    Raises:
        ValueError: If ``impl`` is unknown, the model holds no such layer, or holds one without
            cross-spatial learning, which has but one implementation.
    """
    require_implementation(impl)
    layers = [m for m in model.modules() if isinstance(m, EmaAttn)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no EMA attention layer.")
    if impl != "auto" and not all(layer.cross_spatial for layer in layers):
        raise ValueError("Layers without cross-spatial learning have one implementation, 'auto'.")
    for layer in layers:
        layer.impl = impl
        if layer.folded is not None:
            layer.folded.impl = impl
    return len(layers)


def _require_positive_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
