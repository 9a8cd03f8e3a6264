"""EMA attention by fused Triton kernels: allocates memory and launches the kernels.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample.

One program computes one tile. The forward reads x from memory once and writes the output once. The
backward reads x and the incoming gradient and writes dx; a second kernel sums the gradients of the
parameters over tiles. Maps that are neither contiguous nor channels_last are copied first. The
kernels are experimental until they have been timed on a GPU; README.md here has what was counted.

The backward is that of `ema_timm.ops.cpu.chunks` and saves the same tensors, but in channels_last
the gates are stored as (B·G, H + W, n). Sums over tiles add per-tile vectors in a fixed order,
without atomics: the result has the same bits every time.
"""

import contextlib
import subprocess
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ema_timm.errors import CannotCompileError
from ema_timm.ops.gpu.fused import backward as backward_kernels
from ema_timm.ops.gpu.fused import forward as forward_kernels
from ema_timm.ops.gpu.fused import weight_gradients
from ema_timm.ops.gpu.fused.backward import Scratch
from ema_timm.ops.gpu.fused.tiling import blocks_over_tiles, make_tiling
from ema_timm.ops.gpu.steps import fold_with_v
from ema_timm.ops.saved import Saved, new_saved
from ema_timm.ops.weights import EmaWeights, FoldedWeights


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """Gate ``x``; arguments and result are those of `ema_timm.ops.cpu.chunks.forward`."""
    out = torch.empty_like(x)
    saved = new_saved(x, groups, torch.float32)
    if not save:
        saved = saved._replace(gate_map=x.new_empty(0, dtype=torch.float32))
    if x.numel():
        weights = _packed(weights)
        source, last = laid_out(x)
        target = out if out.stride() == source.stride() else torch.empty_like(source)
        tiling = make_tiling(source, groups, last)
        n = x.shape[1] // groups
        with _launching(x, groups):
            forward_kernels.forward_tile[(tiling.tiles,)](
                source,
                target,
                saved,
                saved.gates.new_empty(tiling.tiles, n * (sum(x.shape[2:]) + 9)),
                weights,
                tiling.size,
                SAVE=save,
                num_warps=tiling.warps,
                num_stages=1,
                **tiling.forward,
            )
        if target is not out:
            out.copy_(target)
    return out, saved if save else None


def backward(
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    weights: EmaWeights,
    groups: int,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, EmaWeights | None]:
    """Gradients; arguments and result are those of `ema_timm.ops.cpu.chunks.backward`."""
    dx = torch.empty_like(x)
    if not x.numel():
        zeros = EmaWeights(*map(torch.zeros_like, weights))
        return dx if need_x else None, zeros if need_weights else None
    folded, v = fold_with_v(weights)
    source, last = laid_out(x)
    target = dx if dx.stride() == source.stride() else torch.empty_like(source)
    if grad.stride() != source.stride():
        grad = torch.empty_like(source).copy_(grad)
    tiling = make_tiling(source, groups, last)
    scratch = _scratch(saved, x)
    with _launching(x, groups):
        backward_kernels.backward_tile[(tiling.tiles,)](
            grad,
            source,
            target,
            saved,
            scratch,
            _packed(folded),
            v,
            tiling.size,
            num_warps=tiling.warps,
            num_stages=1,
            maxnreg=tiling.registers,
            **tiling.backward,
        )
        dw = sum_over_tiles(scratch.parts, scratch.means, v, weights) if need_weights else None
    if target is not dx:
        dx.copy_(target)
    return dx if need_x else None, dw


def _packed(weights: FoldedWeights) -> FoldedWeights:
    """``weights``, contiguous, as the kernels read them."""
    return FoldedWeights(*[w.contiguous() for w in weights])


def laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """``x``, or a copy of it, in a layout that the kernels take, and whether channels are last."""
    if x.is_contiguous():
        return x, False
    last = x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return x.contiguous(memory_format=layout), last


def _scratch(saved: Saved, x: Tensor) -> Scratch:
    """Memory for the intermediate results of one backward."""
    gates = saved.gates
    tiles, n = saved.vectors.shape[1:]

    def empty(*shape: int) -> Tensor:
        return gates.new_empty((tiles, *shape))

    return Scratch(
        empty(x.shape[2] + 2, x.shape[3] + 2),
        *[torch.empty_like(gates) for _ in range(3)],
        empty(n),
        empty(n),
        empty(4 * n),
        empty(9 * n),
        empty(9 * n),
        empty(14 * n + n * n),
    )


def sum_over_tiles(parts: Tensor, means: Tensor, v: Tensor, weights: EmaWeights) -> EmaWeights:
    """Gradients of the parameters from every tile's share of them.

    Args:
        parts: As `ema_timm.ops.gpu.fused.backward.Scratch` has them, as are ``means``.
        means: Shifted means of every tile.
        v: Softmax of β, (n,).
        weights: What the gradients are shaped like.
    """
    tiles, n = parts.shape[0], v.shape[0]
    found = EmaWeights(*[torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in weights])
    programs, blocks = blocks_over_tiles(n)
    weight_gradients.sum_tiles[(programs,)](
        parts, means, v, found, tiles, n=n, num_warps=4, num_stages=3, **blocks
    )
    return found


@contextlib.contextmanager
def _launching(x: Tensor, groups: int) -> Iterator[None]:
    """Launch on the device of ``x``; what fails says for which shape."""
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    try:
        with device:
            yield
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotCompileError(_without_compiler(error, x, groups)) from error
    except RuntimeError as error:
        if str(error).startswith(("Failed to find C compiler", "Could not create or locate cache")):
            raise CannotCompileError(_without_compiler(error, x, groups)) from error
        error.args = (f"{error} [{_described(x, groups)}]",)
        raise
    except triton.TritonError as error:  # these put their text together themselves
        raise RuntimeError(f"{error} [{_described(x, groups)}]") from error


def _without_compiler(error: Exception, x: Tensor, groups: int) -> str:
    return (
        f"Triton compiles the kernels at their first call and could not: {error}. It needs a C "
        "compiler (CC names it) and a folder that it may write (TRITON_CACHE_DIR names it); "
        f"impl='auto' needs neither [{_described(x, groups)}]"
    )


def _described(x: Tensor, groups: int) -> str:
    return (
        f"in EMA attention, impl='fused', of {tuple(x.shape)} with strides {x.stride()} in "
        f"{groups} groups, {x.dtype}, {x.device}"
    )
