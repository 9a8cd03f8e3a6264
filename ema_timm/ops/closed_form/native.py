"""The closed form's CPU kernel: calls the library built from ``csrc`` through ctypes.

The library holds no PyTorch symbol, so one build serves every PyTorch. It shares the OpenMP
threads that PyTorch has started. Where it is absent (no compiler at install time, a platform it
does not know) `eager` does the same in PyTorch, and the log says so once.

B batch, C channels, G groups, n = C / G, H height, W width; BG = B·G tiles.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ema_timm.ops.closed_form.formula import fold
from ema_timm.ops.closed_form.gradients import finish_weights
from ema_timm.ops.closed_form.saved import Saved, new_saved
from ema_timm.ops.weights import EmaWeights, FoldedWeights

_logger = logging.getLogger(__name__)

ABI = 1
"""What ``ema_abi()`` of a library built from this version's source returns."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Shape(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("batch", "groups", "n", "height", "width")],
        *[(name, ctypes.c_int64) for name in ("dtype", "threads", "votes")],
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
        dm: Gradient of the votes of each tile, (BG, n).
        means: Shifted means of each tile, (BG, 9n).
    """

    sums: Tensor
    dm: Tensor
    means: Tensor


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is none; the reason is in the log and in `status`."""
    library, reason = _find()
    if library is None:
        _logger.warning("EMA attention runs on PyTorch operators on the CPU: %s.", reason)
    return library


def status() -> str:
    """One line on the CPU kernel, for people: in use, or why not."""
    library, reason = _find()
    return reason if library is None else "native kernel"


@cache
def _find() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("EMA_TIMM_NATIVE", "1") == "0":
        return None, "the native kernel is switched off by EMA_TIMM_NATIVE=0"
    path = Path(__file__).parent / "_kernel.so"
    if not path.exists():
        return None, "the native kernel was not built (it needs GCC or clang with OpenMP)"
    try:
        found = _open(path)
        abi = found.ema_abi()
    except (OSError, AttributeError) as error:
        return None, f"the native kernel did not load ({error})"
    if abi != ABI:
        return None, f"the native kernel is of another version ({abi}, not {ABI}): reinstall"
    found.ema_sums_size.restype = ctypes.c_int64
    found.ema_sums_size.argtypes = [ctypes.c_int64]
    return found, ""


def _open(path: Path) -> ctypes.CDLL:
    """The library, with the OpenMP that PyTorch has loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # A PyTorch that keeps its OpenMP to itself: the same library again, or the system's.
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            raise error from None
        return ctypes.CDLL(str(path))


def takes(x: Tensor) -> bool:
    """Whether the kernel can run on ``x``, (B, C, H, W).

    It can on a plain, strided CPU tensor of at most 32 bits a number, where a library was built.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and x.dtype in _DTYPES
        and not x.is_neg()
        and x.numel() > 0
        and library() is not None
    )


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """`ema_timm.ops.closed_form.eager.forward` by the kernel: (B, C, H, W) in and out."""
    out = torch.empty_like(x)
    saved = new_saved(x, groups, torch.float32) if save else None
    weights = FoldedWeights(*[w.contiguous() for w in weights])
    shape = _shape(x, out, None, groups, weights)
    _check(
        library().ema_forward(
            ctypes.byref(shape),
            ctypes.byref(_pointers(_Weights, weights)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.byref(_pointers(_Saved, saved or (None,) * 3)),
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
    """`ema_timm.ops.closed_form.eager.backward` by the kernel: (B, C, H, W) in and out."""
    grad = grad.resolve_neg().to(x.dtype)
    weights = EmaWeights(*[w.contiguous() for w in weights])
    folded = FoldedWeights(*[w.contiguous() for w in fold(weights)])
    dx = torch.empty_like(x) if need_x else None
    sums = _new_sums(x, groups) if need_weights else None
    shape = _shape(x, dx if need_x else x, grad, groups, folded)
    _check(
        library().ema_backward(
            ctypes.byref(shape),
            ctypes.byref(_pointers(_Weights, folded)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(grad.data_ptr()),
            ctypes.byref(_pointers(_Saved, saved)),
            ctypes.byref(_pointers(_Grads, (dx, *(sums or (None,) * 3)))),
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


def _shape(x: Tensor, out: Tensor, grad: Tensor | None, groups: int, w: FoldedWeights) -> _Shape:
    batch, channels, height, width = x.shape
    strides = ctypes.c_int64 * 4
    return _Shape(
        batch,
        groups,
        channels // groups,
        height,
        width,
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        w.vote_bias.shape[0],
        strides(*x.stride()),
        strides(*out.stride()),
        strides(*(x if grad is None else grad).stride()),
    )


def _pointers(structure: type[ctypes.Structure], tensors) -> ctypes.Structure:
    return structure(*[None if t is None else t.data_ptr() for t in tensors])


def _check(code: int) -> None:
    if code:
        raise MemoryError("EMA attention's CPU kernel could not allocate its scratch memory.")
