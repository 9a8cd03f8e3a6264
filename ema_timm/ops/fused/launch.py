"""EMA attention by fused Triton kernels: what is allocated, launched and kept.

B batch, C channels, G groups, n = C / G, H height, W width; a tile is one group of one sample.

Two paths compute the same numbers. Where a tile fits on chip, one program takes it from end to
end (`ema_timm.ops.fused.whole_tile`): the forward reads x from memory once and writes the output
once, the backward reads x and the incoming gradient twice and writes dx, 7 units of |x| together
where 5 are the floor. Other tiles are cut into blocks (`ema_timm.ops.fused.split_tile`) with small
PyTorch operators in between: 4 units forward, 8 backward. `ema_timm.ops.fused.plan` draws the line.
Nothing is measured yet: README.md beside this file has predictions and their reasons.

The backward is that of `ema_timm.ops.closed_form.eager` and keeps the same things. Sums over tiles
are taken from per-tile vectors in a fixed order: no atomics, the same bits every time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ema_timm.ops.closed_form.formula import fold, shifted_means, vote
from ema_timm.ops.closed_form.gradients import finish_weights, spread_taps
from ema_timm.ops.closed_form.saved import Saved, new_saved
from ema_timm.ops.fused import split_tile, split_tile_backward, whole_tile, whole_tile_backward
from ema_timm.ops.fused.bundles import Map
from ema_timm.ops.fused.plan import Plan, plan, vectors_of
from ema_timm.ops.fused.split_tile import LineSums
from ema_timm.ops.fused.split_tile_backward import NormTerms
from ema_timm.ops.weights import EmaWeights, FoldedWeights


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """Gate ``x``; arguments and result are those of `ema_timm.ops.closed_form.eager.forward`."""
    out = torch.empty_like(x)
    saved = new_saved(x, groups, torch.float32) if save else None
    if x.numel():
        weights = FoldedWeights(*[w.contiguous() for w in weights])
        cut = plan(x, groups)
        with _launching(x, groups):
            (_forward_whole if cut.whole else _forward_split)(x, out, saved, weights, cut)
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
    """Gradients; arguments and result are those of `ema_timm.ops.closed_form.eager.backward`."""
    dx = torch.empty_like(x)
    if not x.numel():
        zeros = EmaWeights(*map(torch.zeros_like, weights))
        return dx if need_x else None, zeros if need_weights else None
    folded = FoldedWeights(*[w.contiguous() for w in fold(weights)])
    cut = plan(x, groups)
    with _launching(x, groups):
        run = _backward_whole if cut.whole else _backward_split
        found, logits = run(grad, x, dx, saved, folded, cut)
        dw = finish_weights(found, logits, weights) if need_weights else None
    return dx if need_x else None, dw


def _run(kernel: Callable, cut: Plan, *arguments: Any, grid: tuple = (), **constants: Any) -> None:
    """Launch ``kernel`` on every tile.

    Args:
        kernel: One of the kernels' modules.
        cut: Gives the first axis of the grid, the last of the bundles, the constants of the cut.
        arguments: The kernel's other bundles and tensors.
        grid: The other axes of the grid.
        constants: Other constants; ``num_warps`` where it is not that of the cut.
    """
    constants = {"num_warps": cut.warps, **cut.constants, **constants}
    kernel[(cut.tiles, *grid)](*arguments, cut.size, **constants)


def _forward_whole(x, out, saved: Saved | None, w: FoldedWeights, cut: Plan) -> None:
    _run(
        whole_tile.forward_tile,
        cut,
        Map.of(x),
        Map.of(out),
        saved or Saved(*[x.new_empty(0, dtype=torch.float32)] * 3),
        w,
        DROPPED=cut.n - w.vote_bias.shape[0],
        SAVE=saved is not None,
        **vectors_of(cut.n, x, out),
    )


def _backward_whole(
    grad, x, dx, saved: Saved, w: FoldedWeights, cut: Plan
) -> tuple[FoldedWeights, Tensor]:
    n = cut.n
    vectors = vectors_of(n, grad, x, dx)
    dl = _gate_gradient(grad, x, saved, cut, vectors)
    parts = _empty(x, cut.tiles, 13 * n + n * n + 1)
    means = _empty(x, cut.tiles, 9 * n)
    arguments = Map.of(grad), Map.of(x), Map.of(dx), saved, dl, w, parts, means
    _run(whole_tile_backward.backward_tile, cut, *arguments, **vectors, num_warps=8)
    dm = parts[:, 9 * n : 10 * n]
    # Copies: an operator's results must not share memory.
    kernel, dm_sum, dgamma, dbeta, mix_bias, mix, logits = (
        t.clone() for t in parts.sum(0).split([9 * n, n, n, n, n, n * n, 1])
    )
    found = FoldedWeights(
        mix.view(n, n), mix_bias, kernel.view(9, n), dm.t() @ means, dm_sum, dgamma, dbeta
    )
    return found, logits


def _gate_gradient(grad, x, saved: Saved, cut: Plan, vectors: dict) -> Tensor:
    """dL, (B·G, H, W), of any shape: programs take blocks of pixels."""
    dl = torch.empty_like(saved.gate_map)
    kernel = whole_tile_backward.gate_gradient
    _run(kernel, cut, Map.of(grad), Map.of(x), saved.gate_map, dl, grid=cut.grid, **vectors)
    return dl


def _forward_split(x, out, saved: Saved | None, w: FoldedWeights, cut: Plan) -> None:
    kept = saved or new_saved(x, cut.groups, torch.float32)
    pooled, means = _pool(x, cut)
    torch.matmul(w.mix_weight, pooled, out=kept.gates)
    kept.gates.add_(w.mix_bias[:, None]).sigmoid_()
    kept.vectors[3] = vote(means, w)
    _statistics(x, kept, cut)
    maps, grid = (Map.of(x), Map.of(out)), (cut.blocks,)
    _run(split_tile.apply_gate, cut, *maps, kept, w, grid=grid, SAVE=saved is not None)


def _statistics(x: Tensor, kept: Saved, cut: Plan) -> None:
    """Write mean, rest and 1/std of y to ``kept``, whose gates are there."""
    parts = _empty(x, 3, cut.blocks, cut.tiles, cut.n)
    _run(split_tile.block_statistics, cut, Map.of(x), kept, parts, grid=cut.block_grid)
    grid, merge = (cut.channel_blocks,), split_tile.merge_statistics
    _run(merge, cut, parts, kept, cut.blocks, grid=grid, BB=16, num_warps=4)


def _backward_split(
    grad, x, dx, saved: Saved, w: FoldedWeights, cut: Plan
) -> tuple[FoldedWeights, Tensor]:
    area = cut.height * cut.width
    r, u = saved.vectors[2:]
    pooled, means = _pool(x, cut)
    dl = _gate_gradient(grad, x, saved, cut, {"VECTOR": 1, "LAST": False})
    dl_sum = dl.sum((1, 2))[:, None]  # (BG, 1)
    dkernel, y_dot = _gradient_sums(x, saved, dl, cut)
    y_dot = y_dot * r
    du = w.gn_weight * y_dot + w.gn_bias * dl_sum
    dm = u * (du - (u * du).sum(1, keepdim=True))

    norm = NormTerms(dl_sum / area, r * y_dot / area, w.gn_weight)
    dmix = _mix_gradient(x, saved, dl, norm, cut)
    terms, taps = _border_terms(dm, dmix, w, cut)
    arguments = Map.of(grad), Map.of(x), Map.of(dx), saved, dl, norm, w.kernel, terms, taps
    _run(split_tile_backward.input_gradient, cut, *arguments, grid=cut.block_grid)
    found = FoldedWeights(
        torch.matmul(dmix, pooled.mT).sum(0),
        dmix.sum((0, 2)),
        dkernel,
        dm.t() @ means,
        dm.sum(0),
        (u * y_dot).sum(0),
        (u * dl_sum).sum(0),
    )
    return found, dl_sum.sum(0)


def _gradient_sums(x, saved: Saved, dl: Tensor, cut: Plan) -> tuple[Tensor, Tensor]:
    """dk, (9, n), and of each tile Σ dL·(y − μ), (B·G, n)."""
    parts = _empty(x, cut.blocks, cut.tiles, 10, cut.n)
    kernel = split_tile_backward.block_gradient_sums
    _run(kernel, cut, Map.of(x), saved, dl, parts, grid=cut.block_grid)
    sums = parts.sum(0)  # (BG, 10, n)
    return sums[:, :9].sum(0), sums[:, 9]


def _mix_gradient(x, saved: Saved, dl: Tensor, norm: NormTerms, cut: Plan) -> Tensor:
    """[dp | dq], the gradient before the gates, (B·G, n, H + W)."""
    sums = _line_sums(x, cut)
    kernel = split_tile_backward.block_gate_gradients
    _run(kernel, cut, Map.of(x), saved, dl, norm, sums, grid=cut.block_grid)
    dmix = torch.cat([sums.rows.sum(0), sums.columns.sum(0)], -1)
    return dmix.mul_(saved.gates).mul_(1 - saved.gates)


def _border_terms(dm, dmix, w: FoldedWeights, cut: Plan) -> tuple[Tensor, Tensor]:
    """What reaches a pixel through its row and its column, (B·G, n, H + W), and a corner."""
    height, width = cut.height, cut.width
    taps = (dm @ w.vote_weight).div_(height * width).view(cut.tiles, cut.n, 3, 3)
    terms = torch.matmul(w.mix_weight.t(), dmix)
    rows, columns = terms[..., :height], terms[..., height:]
    rows /= width
    columns /= height
    spread_taps(taps, rows, columns)
    return terms, taps


def _pool(x: Tensor, cut: Plan) -> tuple[Tensor, Tensor]:
    """Row and column means (B·G, n, H + W) and shifted means (B·G, 9n) of a split tile."""
    sums = _line_sums(x, cut)
    _run(split_tile.pool_blocks, cut, Map.of(x), sums, grid=cut.block_grid)
    row, col = sums.rows.sum(0) / cut.width, sums.columns.sum(0) / cut.height
    # Of the map itself the shifted means need the corner pixels alone.
    corners = x[..., :: max(cut.height - 1, 1), :: max(cut.width - 1, 1)].float()
    corners = corners.reshape(cut.tiles, cut.n, *corners.shape[2:])
    return torch.cat([row, col], -1), shifted_means(corners, row, col).flatten(1)


def _line_sums(x: Tensor, cut: Plan) -> LineSums:
    """Memory for each block's sums along W and along H."""
    down, across = cut.grid
    return LineSums(
        _empty(x, across, cut.tiles, cut.n, cut.height),
        _empty(x, down, cut.tiles, cut.n, cut.width),
    )


def _empty(x: Tensor, *shape: int) -> Tensor:
    """Memory for what kernels tell each other, beside ``x``."""
    return x.new_empty(shape, dtype=torch.float32)


@contextlib.contextmanager
def _launching(x: Tensor, groups: int) -> Iterator[None]:
    """Launch on the device of ``x``; what fails says for which shape."""
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    try:
        with device:
            yield
    except RuntimeError as error:
        error.args = (f"{error} [{_described(x, groups)}]",)
        raise
    except triton.TritonError as error:  # these put their text together themselves
        raise RuntimeError(f"{error} [{_described(x, groups)}]") from error


def _described(x: Tensor, groups: int) -> str:
    return (
        f"in EMA attention, impl='fused', of {tuple(x.shape)} with strides {x.stride()} in "
        f"{groups} groups, {x.dtype}, {x.device}"
    )
