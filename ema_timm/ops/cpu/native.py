"""The closed form's CPU kernel: calls the library built from ``csrc`` through ctypes.

The library holds no PyTorch symbol, so one build serves every PyTorch. It shares the OpenMP
threads that PyTorch has started. If it is missing (no compiler at install time, an unsupported
platform), `chunks` computes the same in PyTorch, and `library` logs that once.

B batch, C channels, G groups, n = C / G, H height, W width; BG = B·G tiles.
"""

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.cpu.library import has_float16, library
from ema_timm.ops.formula import fold
from ema_timm.ops.saved import Saved, finish_weights, new_saved
from ema_timm.ops.weights import EmaWeights, FoldedWeights

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = torch.strided
# What has no memory points at null plus its offset; asking the storage itself costs more.
_LOW = 1 << 32
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


class _Shape(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("batch", "groups", "n", "height", "width")],
        *[(name, ctypes.c_int64) for name in ("dtype", "threads")],
        *[(name, ctypes.c_int64 * 4) for name in ("x", "out", "grad")],
    )


class _Weights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in FoldedWeights._fields)


class _Saved(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in Saved._fields)


class _Grads(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("dx", "sums", "dm", "means"))


class _Sums(NamedTuple):
    """What the kernel leaves of the parameters' gradients; n channels of a group.

    Attributes:
        sums: One row a thread, (threads, ema_sums_size(n)): they depend on the number of threads,
            never on their timing.
        dm: Gradient of the logits of u of each tile, (BG, n).
        means: Shifted means of each tile, (BG, 9n).
    """

    sums: Tensor
    dm: Tensor
    means: Tensor


@cache
def _dtypes() -> dict[torch.dtype, int]:
    """The types of maps that the library takes, and its numbers for them; empty without one."""
    if library() is None:
        return {}
    found = {torch.float32: 0, torch.bfloat16: 1}
    return {**found, torch.float16: 2} if has_float16() else found


def takes(x: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether the kernel can run. It gets bare pointers, so every tensor is checked.

    The kernel needs plain, strided CPU tensors and a library. It does not run under a dispatch
    mode, which could not see it.

    Args:
        x: (B, C, H, W).
        others: All else from outside: the layer's parameters, folded or not, and in the backward
            what `Saved` keeps and the gradient.

    Raises:
        RuntimeError: If the memory of a tensor was freed: PyTorch's operators would crash on it.
    """
    if not x.is_cpu or x.dtype not in _dtypes():
        return False
    if x.numel() == 0 or torch._C._len_torch_dispatch_stack():
        return False
    # Every call passes here, so the loop is written out and makes the cheapest checks.
    for tensor in (x, *others):
        if (
            type(tensor) not in _PLAIN
            or not tensor.is_cpu
            or tensor.layout is not _STRIDED
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
        if tensor.data_ptr() < _LOW and _is_freed(tensor):
            raise RuntimeError(
                f"The memory of a tensor of shape {tuple(tensor.shape)} was freed before EMA "
                "attention read it. Call the layer, and its backward, while its tensors are there."
            )
    return True


def _is_freed(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def is_watched() -> bool:
    """Whether a dispatch mode is on, as in make_fx and under fake tensors."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """`ema_timm.ops.cpu.chunks.forward` by the kernel: (B, C, H, W) in and out."""
    out = torch.empty_like(x)
    saved = new_saved(x, groups, torch.float32) if save else None
    weights = FoldedWeights(*[w.contiguous() for w in weights])
    shape = _shape(x, out, None, groups)
    _check(
        library().ema_forward(
            ctypes.byref(shape),
            ctypes.byref(_pointers(_Weights, weights)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.byref(_pointers(_Saved, saved) if save else _Saved()),
        )
    )
    return out, saved


def backward(
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    weights: EmaWeights,
    groups: int,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, EmaWeights | None]:
    """`ema_timm.ops.cpu.chunks.backward` by the kernel: (B, C, H, W) in and out."""
    grad = grad.resolve_neg().to(x.dtype)
    weights = EmaWeights(*[w.contiguous() for w in weights])
    folded = FoldedWeights(*[w.contiguous() for w in fold(weights)])
    dx = torch.empty_like(x) if need_x else None
    sums = _new_sums(x, groups) if need_weights else None
    shape = _shape(x, dx if need_x else x, grad, groups)
    _check(
        library().ema_backward(
            ctypes.byref(shape),
            ctypes.byref(_pointers(_Weights, folded)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(grad.data_ptr()),
            ctypes.byref(_pointers(_Saved, saved)),
            ctypes.byref(_pointers(_Grads, (dx, *(sums or ())))),
        )
    )
    return dx, None if sums is None else _weight_gradients(sums, weights)


def _new_sums(x: Tensor, groups: int) -> _Sums:
    n, tiles = x.shape[1] // groups, x.shape[0] * groups
    size = library().ema_sums_size(n)
    return _Sums(
        x.new_zeros((torch.get_num_threads(), size), dtype=torch.float32),
        x.new_empty((tiles, n), dtype=torch.float32),
        x.new_empty((tiles, 9 * n), dtype=torch.float32),
    )


def _weight_gradients(found: _Sums, weights: EmaWeights) -> EmaWeights:
    n = weights.gn_weight.shape[0]
    parts = found.sums.sum(0).split([n * n, 9 * n, n, n, n, 1])
    # Copies, because a gradient must not share memory with another.
    mix, kernel, mix_bias, gn_weight, gn_bias, logits = [part.clone() for part in parts]
    folded = FoldedWeights(
        mix.view(n, n),
        mix_bias,
        kernel.view(n, 9).t(),
        found.dm.t() @ found.means,
        found.dm.sum(0),
        gn_weight,
        gn_bias,
    )
    return finish_weights(folded, logits, weights)


def _shape(x: Tensor, out: Tensor, grad: Tensor | None, groups: int) -> _Shape:
    batch, channels, height, width = x.shape
    strides = ctypes.c_int64 * 4
    return _Shape(
        batch,
        groups,
        channels // groups,
        height,
        width,
        _dtypes()[x.dtype],
        torch.get_num_threads(),
        strides(*x.stride()),
        strides(*out.stride()),
        strides(*(x if grad is None else grad).stride()),
    )


def _pointers(structure: type[ctypes.Structure], tensors) -> ctypes.Structure:
    return structure(*[None if t is None else t.data_ptr() for t in tensors])


def _check(code: int) -> None:
    if code:
        raise MemoryError("EMA attention's CPU kernel could not allocate its scratch memory.")
