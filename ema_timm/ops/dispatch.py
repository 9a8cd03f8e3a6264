"""The only place that validates a call and chooses an implementation.

It chooses the form of the computation. For the closed form in eager mode `ema_timm.ops.autograd`
then chooses the kernel of the device, and chooses again in the backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ema_timm.errors import CannotCompileError, first_line
from ema_timm.ops.autograd import closed_form_eager, outside_autocast
from ema_timm.ops.cpu.native import is_watched
from ema_timm.ops.export.dialects import closed_form_exported
from ema_timm.ops.formula import closed_form
from ema_timm.ops.gpu import choices, passes
from ema_timm.ops.gpu.fused.available import fused_unavailable, require_fused
from ema_timm.ops.parallel import parallel
from ema_timm.ops.reference import reference
from ema_timm.ops.saved import is_recorded
from ema_timm.ops.weights import EmaWeights, require_fit

# Before PyTorch 2.7 nothing tells compiling from exporting; the exported form suits both.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)

IMPLEMENTATIONS = ("reference", "closed_form", "fused")

_Implementation = Callable[[Tensor, EmaWeights, int], Tensor]


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
            "closed_form" or "fused" (Triton kernels: experimental until they have been timed on a
            GPU).
        cross_spatial: False leaves the cross-spatial step out, the paper's ablation as
            `ema_timm.ops.parallel` defines it. It needs impl="auto".

    Returns:
        Tensor with the shape, dtype and memory format of ``x``, owning its memory.

    Raises:
        ValueError: If the shapes do not fit together, or ``impl`` is unknown, or is not "auto"
            without cross-spatial learning.
        TypeError: If ``x`` is not floating point.
        RuntimeError: If "fused" is requested where it cannot run.
    """
    if torch.jit.is_scripting():
        return closed_form(x, weights, groups) if cross_spatial else parallel(x, weights, groups)
    else:  # the script compiler does not read this branch
        if not torch.jit.is_tracing():
            require_implementation(impl, cross_spatial)
            require_fit(x, weights, groups)
        run = _implementation(x, weights, groups, impl) if cross_spatial else parallel
        return outside_autocast(run, x, weights, groups)


def require_implementation(impl: str, cross_spatial: bool = True) -> None:
    """Raise ValueError unless ``impl`` is "auto" or an implementation that the layer has."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}.")
    if impl != "auto" and not cross_spatial:
        raise ValueError(
            "impl must be 'auto' without cross-spatial learning, which has one implementation, "
            f"got impl={impl!r}."
        )


def _implementation(x: Tensor, weights: EmaWeights, groups: int, impl: str) -> _Implementation:
    if impl == "auto" and x.is_cuda:
        impl = _tuned(x, weights, groups)
        if impl == "fused":
            return _fused_or_closed_form
    if impl == "reference":
        return reference
    if impl == "fused":
        require_fused(x, weights.gn_weight)
        return _fused
    return _closed_form(x)


def _tuned(x: Tensor, weights: EmaWeights, groups: int) -> str:
    """What `ema_timm.tune` chose for a call in eager mode on CUDA.

    Only a measurement on the user's GPU makes "auto" leave the closed form.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched():
        return "closed_form"
    name = choices.look_up(x, groups, is_recorded(x, weights))
    if name == "fused" and (reason := fused_unavailable(x, weights.gn_weight)):
        choices.pass_over(reason)
        return "closed_form"
    return name or "closed_form"


def _fused(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    # Imported at the first call: registering the operators is slow, and most processes need none.
    from ema_timm.ops.operators import fused_operator

    return fused_operator(x, weights, groups)


def _fused_or_closed_form(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`_fused` as `ema_timm.tune` chose it: the closed form where Triton cannot compile any more.

    The machine may have changed since: another compiler, a full disk.
    """
    try:
        return _fused(x, weights, groups)
    except CannotCompileError as error:
        choices.give_up(x.device, f"Triton could not compile them: {first_line(error.__cause__)}")
        return _closed_form(x)(x, weights, groups)


def _closed_form(x: Tensor) -> _Implementation:
    """The implementation of the closed form that suits the caller.

    Measured in ops/cpu/README.md: a compiled ResNet on the CPU trains and infers faster around the
    custom operator than with a formula for Inductor to fuse. An exported program consists of
    PyTorch's own operators, so that it runs where this package is not installed.
    """
    if torch.compiler.is_compiling():
        if _is_exporting():
            return closed_form_exported
        if x.device.type == "cpu":
            return _closed_form_operator
        return _closed_form_for_inductor if x.device.type == "cuda" else closed_form
    if torch.jit.is_tracing():
        return closed_form_exported
    return closed_form if _needs_pytorch_operators(x) else closed_form_eager


def _needs_pytorch_operators(x: Tensor) -> bool:
    """Whether something must see PyTorch's operators, or no hand-written pass suits ``x``."""
    return (
        x.device.type == "meta"
        # On devices other than the CPU and CUDA the chunks of PyTorch operators take the whole of
        # a contiguous map at once, but each sample of other layouts by itself.
        or (x.device.type not in ("cpu", "cuda") and not x.is_contiguous())
        or torch._C._are_functorch_transforms_active()
        or forward_ad.unpack_dual(x).tangent is not None
        # The passes on CUDA are PyTorch's operators, which a dispatch mode sees.
        or (is_watched() and not passes.takes(x))
    )


def _closed_form_operator(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    from ema_timm.ops.operators import closed_form_operator  # late, as in `_fused`

    return closed_form_operator(x, weights, groups)


def _closed_form_for_inductor(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    return closed_form(x, weights, groups, for_inductor=True)
