"""Whether the Triton kernels can run a call, answered without importing Triton where it can be.

What needs Triton to answer is in `ema_timm.ops.gpu.fused.tiling`, imported late: Triton may be
missing, and importing it takes longer than all of this package.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def require_fused(x: Tensor, weight: Tensor) -> None:
    """Raise RuntimeError with the reason where `fused_unavailable` gives one."""
    reason = fused_unavailable(x, weight)
    if reason:
        raise RuntimeError(
            f"impl='fused' cannot run here: {reason}. Use impl='auto', which always can."
        )


def fused_unavailable(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels cannot run a call, or None if they can.

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
