"""The only place that validates a call and chooses an implementation."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ema_timm.errors import CannotCompileError, first_line
from ema_timm.ops.autograd import closed_form_eager, closed_form_folded_eager
from ema_timm.ops.cpu.native import is_watched
from ema_timm.ops.export.dialects import closed_form_exported
from ema_timm.ops.formula import closed_form, closed_form_folded
from ema_timm.ops.gpu import choices, passes
from ema_timm.ops.parallel import parallel
from ema_timm.ops.reference import reference
from ema_timm.ops.weights import EmaWeights, FoldedWeights, fits, misfit

# Before PyTorch 2.7 nothing tells compiling from exporting; the form that suits both is taken.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)

IMPLEMENTATIONS = ("reference", "closed_form", "fused")


def ema_attention(
    x: Tensor,
    weights: EmaWeights,
    groups: int,
    impl: str = "auto",
    cross_spatial: bool = True,
) -> Tensor:
    """Gate each channel group of ``x`` with Efficient Multi-scale Attention.

    Source: Ouyang et al., ICASSP 2023, arXiv:2305.13563. Statistics, softmax and the gate are
    computed in float32 (float64 for float64 input), also under autocast.

    Args:
        x: Feature map, (B, C, H, W), floating point, H and W at least 1.
        weights: Parameters of one layer, shared by all groups; n = C / G channels wide.
        groups: G; must divide C.
        impl: "auto" (closed_form, or on CUDA what `ema_timm.tune` chose), "reference",
            "closed_form" or "fused" (Triton kernels).
        cross_spatial: False leaves the cross-spatial step out, the paper's ablation as
            `ema_timm.ops.parallel` defines it; it has one implementation, "auto".

    Returns:
        Tensor with the shape, dtype and memory format of ``x``, owning its memory.

    Raises:
        ValueError: If the shapes do not fit together, ``impl`` is unknown, or another than "auto"
            is asked for without cross-spatial learning.
        TypeError: If ``x`` is not floating point.
        RuntimeError: If "fused" is asked for where it cannot run.
    """
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing():
            _validate(x, weights, groups, impl)
            if not cross_spatial:
                _require_auto(impl)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _run(x, weights, groups, impl, cross_spatial)
    return _run(x, weights, groups, impl, cross_spatial)


def folded_ema_attention(
    x: Tensor, weights: FoldedWeights, groups: int, impl: str = "auto"
) -> Tensor:
    """`ema_attention` from weights folded once, for inference.

    Differentiable in ``x`` by plain autograd of the closed form.

    Args:
        x: Feature map, (B, C, H, W), floating point, H and W at least 1.
        weights: Folded parameters of one layer, of any floating point type.
        groups: G; must divide C.
        impl: As `ema_attention` takes it; folded weights have no "reference" and take
            "closed_form" for it.

    Returns:
        Tensor with the shape, dtype and memory format of ``x``, owning its memory.

    Raises:
        ValueError: If the shapes do not fit together.
        TypeError: If ``x`` is not floating point.
    """
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing():
            _validate(x, weights, groups, impl)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _run_folded(x, weights, groups, impl)
    return _run_folded(x, weights, groups, impl)


def _run_folded(x: Tensor, weights: FoldedWeights, groups: int, impl: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    w = FoldedWeights(
        weights.mix_weight.to(dtype),
        weights.mix_bias.to(dtype),
        weights.kernel.to(dtype),
        weights.vote_weight.to(dtype),
        weights.vote_bias.to(dtype),
        weights.gn_weight.to(dtype),
        weights.gn_bias.to(dtype),
    )
    if not torch.jit.is_scripting():
        recorded = torch.is_grad_enabled() and (x.requires_grad or w.gn_bias.requires_grad)
        looked_up = impl == "auto" and x.is_cuda
        if looked_up:
            impl = _chosen(x, w, groups)
        if impl == "fused":
            operators = _fused(x, w.gn_weight)
            if recorded:
                return closed_form_folded(x, w, groups)
            out = _by_kernels(operators.fused_folded_operator, x, w, groups, looked_up)
            if out is not None:
                return out
        form = _closed_form(x)
        if form == "eager" and not recorded:
            return closed_form_folded_eager(x, w, groups)
        if form == "inductor":
            return closed_form_folded(x, w, groups, True)
    return closed_form_folded(x, w, groups)


def _run(x: Tensor, weights: EmaWeights, groups: int, impl: str, cross_spatial: bool) -> Tensor:
    if not cross_spatial:
        return parallel(x, weights, groups)
    if not torch.jit.is_scripting():
        looked_up = impl == "auto" and x.is_cuda
        if looked_up:
            impl = _chosen(x, weights, groups)
        if impl == "reference":
            return reference(x, weights, groups)
        if impl == "fused":
            operators = _fused(x, weights.gn_weight)
            out = _by_kernels(operators.fused_operator, x, weights, groups, looked_up)
            if out is not None:
                return out
        form = _closed_form(x)
        if form == "opaque":
            return _opaque(x, weights, groups)
        if form == "eager":
            return closed_form_eager(x, weights, groups)
        if form == "exported":
            return closed_form_exported(x, weights, groups)
        if form == "inductor":
            return closed_form(x, weights, groups, True)
    return closed_form(x, weights, groups)


def _chosen(x: Tensor, weights: EmaWeights | FoldedWeights, groups: int) -> str:
    """Who "auto" is on CUDA: looked up, where plain tensors are computed at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched():
        return "closed_form"
    needed = x.requires_grad or any(w.requires_grad for w in weights)
    name = choices.look_up(x, groups, torch.is_grad_enabled() and needed)
    if name == "fused" and (reason := fused_unavailable(x, weights.gn_weight)):
        choices.pass_over(reason)
        return "closed_form"
    return name or "closed_form"


def _by_kernels(
    operator: Callable[..., Tensor],
    x: Tensor,
    weights: EmaWeights | FoldedWeights,
    groups: int,
    looked_up: bool,
) -> Tensor | None:
    """What ``operator`` makes of ``x``; None where "auto" chose it and it cannot be compiled.

    What was tuned on a machine meets another compiler or a full disk there later. Who asked for the
    kernels by name gets the error.
    """
    try:
        return operator(x, weights, groups)
    except CannotCompileError as error:
        if not looked_up:
            raise
        choices.give_up(x.device, f"Triton could not compile them: {first_line(error.__cause__)}")
        return None


def _opaque(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    # Imported at the first compile: it is slow and most processes never need it.
    from ema_timm.ops.operators import closed_form_opaque

    return closed_form_opaque(x, weights, groups)


def _fused(x: Tensor, weight: Tensor) -> ModuleType:
    """The module of the operators, once it is clear that the Triton kernels can take the call.

    Chosen by "auto" only where `ema_timm.tune` measured on the user's GPU that they are faster than
    the closed form: what is not measured is not a default.
    """
    reason = fused_unavailable(x, weight)
    if reason:
        raise RuntimeError(
            f"impl='fused' cannot run here: {reason}. Use impl='auto', which always can."
        )
    from ema_timm.ops import operators

    return operators


def fused_unavailable(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels cannot take a call, or None if they can.

    Args:
        x: The feature map, (B, C, H, W).
        weight: One of the layer's vectors, (n,).
    """
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "torch.jit.trace and torch.func do not look into its operators"
    if forward_ad.unpack_dual(x).tangent is not None:
        return "it has no forward-mode derivative"
    if weight.device != x.device:
        return f"the input is on {x.device} and the layer's weights are on {weight.device}"
    try:
        from ema_timm.ops.gpu.fused import tiling
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "Triton is not installed (PyTorch's CUDA builds for Linux bring it)"
    return tiling.unavailable(x, weight.shape[0])


def _closed_form(x: Tensor) -> str:
    """Which writing of the closed form suits who looks on.

    "traceable", "exported", "inductor" (traceable too, for it to fuse on a GPU), "eager" or
    "opaque".

    Measured in closed_form/README.md: a compiled ResNet on the CPU trains and infers faster around
    the opaque operator than with a form for Inductor to fuse. An exported program stays made of
    PyTorch's own operators, so that it runs where this package is not.
    """
    if torch.compiler.is_compiling():
        if _is_exporting():
            return "exported"
        return {"cpu": "opaque", "cuda": "inductor"}.get(x.device.type, "traceable")
    if torch.jit.is_tracing():
        return "exported"
    if (
        x.device.type == "meta"
        # Elsewhere than on the CPU and CUDA the eager loops run once, where a map is contiguous; in
        # other layouts they would run once a sample.
        or (x.device.type not in ("cpu", "cuda") and not x.is_contiguous())
        or torch._C._are_functorch_transforms_active()
        or forward_ad.unpack_dual(x).tangent is not None
        # What runs on CUDA is PyTorch's operators, which a dispatch mode sees.
        or (is_watched() and not passes.takes(x))
    ):
        return "traceable"
    return "eager"


def _require_auto(impl: str) -> None:
    if impl != "auto":
        raise ValueError(
            f"Without cross-spatial learning there is one implementation, got impl={impl!r}. "
            "Leave impl at 'auto'."
        )


def require_implementation(impl: str) -> None:
    """Raise ValueError where ``impl`` is not the name of an implementation, nor "auto"."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}.")


def _validate(x: Tensor, weights: EmaWeights | FoldedWeights, groups: int, impl: str) -> None:
    require_implementation(impl)
    if x.dim() != 4:
        raise ValueError(
            f"EMA attention takes a feature map of 4 dimensions (B, C, H, W), got {x.dim()} "
            f"with shape {tuple(x.shape)}. Add the batch dimension with x.unsqueeze(0), or "
            "reshape tokens to a map first."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"EMA attention takes floating point input, got {x.dtype}. Convert it first, for "
            "example with x.float()."
        )
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r} ({type(groups).__name__}).")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}.")
    n = weights.gn_weight.numel()
    if not fits(weights, n):
        raise ValueError(misfit(weights, x.shape[1] // groups))
    if x.shape[1] != groups * n:
        raise ValueError(
            f"The layer's weights are for {groups * n} channels ({groups} groups of {n}), got "
            f"input with {x.shape[1]} channels, shape {tuple(x.shape)}. Build the layer as "
            f"EmaAttn({x.shape[1]}) or give it the feature map it was made for."
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"H and W must be at least 1, got shape {tuple(x.shape)}.")
