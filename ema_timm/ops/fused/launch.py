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
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ema_timm.ops.closed_form.eager import Saved, finish_weights, new_saved, spread_taps
from ema_timm.ops.closed_form.formula import fold, shifted_means, vote
from ema_timm.ops.fused import split_tile, whole_tile
from ema_timm.ops.fused.plan import Plan, plan, vectors_of
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
            (_forward_whole if cut.whole else _forward_split)(x, weights, groups, out, saved, cut)
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
        found, logits = run(grad, x, dx, saved, folded, groups, cut)
        dw = finish_weights(found, logits, weights) if need_weights else None
    return dx if need_x else None, dw


def _forward_whole(x, w: FoldedWeights, groups, out, saved: Saved | None, cut: Plan) -> None:
    tiles, n = x.shape[0] * groups, x.shape[1] // groups
    kept = saved or [x.new_empty(0, dtype=torch.float32)] * 3
    whole_tile.forward_tile[(tiles,)](
        x,
        out,
        *kept,
        *w[:5],
        w.gn_weight,
        w.gn_bias,
        tiles,
        groups,
        *x.shape[2:],
        *x.stride(),
        *out.stride(),
        **cut.sizes(n),
        DROPPED=n - w.vote_bias.shape[0],
        SAVE=saved is not None,
        **vectors_of(n, x, out),
        num_warps=cut.warps,
    )


def _backward_whole(
    grad, x, dx, saved: Saved, w: FoldedWeights, groups, cut: Plan
) -> tuple[FoldedWeights, Tensor]:
    tiles, n = x.shape[0] * groups, x.shape[1] // groups
    vectors = vectors_of(n, grad, x, dx)
    dl = _gate_gradient(grad, x, saved, groups, cut, vectors)
    parts = x.new_empty((tiles, 13 * n + n * n + 1), dtype=torch.float32)
    means = x.new_empty((tiles, 9 * n), dtype=torch.float32)
    whole_tile.backward_tile[(tiles,)](
        grad,
        x,
        dx,
        *saved,
        dl,
        w.mix_weight,
        w.kernel,
        w.vote_weight,
        w.gn_weight,
        w.gn_bias,
        parts,
        means,
        tiles,
        groups,
        *x.shape[2:],
        *grad.stride(),
        *x.stride(),
        *dx.stride(),
        **cut.sizes(n),
        **vectors,
        num_warps=8,
    )
    dm = parts[:, 9 * n : 10 * n]
    # Copies: an operator's results must not share memory.
    kernel, dm_sum, dgamma, dbeta, mix_bias, mix, logits = (
        t.clone() for t in parts.sum(0).split([9 * n, n, n, n, n, n * n, 1])
    )
    found = FoldedWeights(
        mix.view(n, n), mix_bias, kernel.view(9, n), dm.t() @ means, dm_sum, dgamma, dbeta
    )
    return found, logits


def _gate_gradient(grad, x, saved: Saved, groups, cut: Plan, vectors: dict) -> Tensor:
    """dL, (B·G, H, W), of any shape: programs take blocks of pixels."""
    tiles, n = x.shape[0] * groups, x.shape[1] // groups
    dl = torch.empty_like(saved.gate_map)
    whole_tile.gate_gradient[(tiles, *cut.grid(*x.shape[2:]))](
        grad,
        x,
        saved.gate_map,
        dl,
        groups,
        *x.shape[2:],
        *grad.stride(),
        *x.stride(),
        **cut.sizes(n),
        **vectors,
        num_warps=cut.warps,
    )
    return dl


def _forward_split(x, w: FoldedWeights, groups, out, saved: Saved | None, cut: Plan) -> None:
    tiles, n, height, width = x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:]
    kept = saved or new_saved(x, groups, torch.float32)
    pooled, means = _pool(x, groups, cut)
    torch.matmul(w.mix_weight, pooled, out=kept.gates)
    kept.gates.add_(w.mix_bias[:, None]).sigmoid_()
    kept.vectors[3] = vote(means, w)
    blocks, channel_blocks = cut.blocks(height, width), triton.cdiv(n, cut.channels)
    parts = x.new_empty((3, blocks, tiles, n), dtype=torch.float32)
    split_tile.block_statistics[(tiles, blocks, channel_blocks)](
        x,
        kept.gates,
        parts,
        tiles,
        groups,
        height,
        width,
        *x.stride(),
        **cut.sizes(n),
        num_warps=cut.warps,
    )
    split_tile.merge_statistics[(tiles, channel_blocks)](
        parts, kept.vectors, blocks, tiles, height, width, **cut.sizes(n), BB=16, num_warps=4
    )
    split_tile.apply_gate[(tiles, blocks)](
        x,
        out,
        *kept,
        w.kernel,
        w.gn_weight,
        w.gn_bias,
        tiles,
        groups,
        height,
        width,
        *x.stride(),
        *out.stride(),
        SAVE=saved is not None,
        **cut.sizes(n),
        num_warps=cut.warps,
    )


def _backward_split(
    grad, x, dx, saved: Saved, w: FoldedWeights, groups, cut: Plan
) -> tuple[FoldedWeights, Tensor]:
    tiles, n, height, width = x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:]
    area = height * width
    blocks, channel_blocks = cut.blocks(height, width), triton.cdiv(n, cut.channels)
    grid = tiles, blocks, channel_blocks
    where = tiles, groups, height, width, *x.stride()
    _, _, r, u = saved.vectors
    pooled, means = _pool(x, groups, cut)

    dl = _gate_gradient(grad, x, saved, groups, cut, {"VECTOR": 1, "LAST": False})
    dl_sum = dl.sum((1, 2))[:, None]  # (BG, 1)
    parts = x.new_empty((blocks, tiles, 10, n), dtype=torch.float32)
    split_tile.block_gradient_sums[grid](
        x, saved.gates, saved.vectors, dl, parts, *where, **cut.sizes(n), num_warps=cut.warps
    )
    sums = parts.sum(0)  # (BG, 10, n)
    y_dot = sums[:, 9] * r
    du = w.gn_weight * y_dot + w.gn_bias * dl_sum
    dm = u * (du - (u * du).sum(1, keepdim=True))

    norm = dl_sum / area, r * y_dot / area, w.gn_weight
    rows, columns = _line_sums(x, groups, cut)
    split_tile.block_gate_gradients[grid](
        x, saved.gates, saved.vectors, dl, *norm, rows, columns, *where, **cut.sizes(n),
        num_warps=cut.warps,
    )  # fmt: skip
    dmix = torch.cat([rows.sum(0), columns.sum(0)], -1)
    dmix.mul_(saved.gates).mul_(1 - saved.gates)  # (BG, n, H + W)

    taps = (dm @ w.vote_weight).div_(area).view(tiles, n, 3, 3)
    terms = torch.matmul(w.mix_weight.t(), dmix)
    terms[..., :height] /= width
    terms[..., height:] /= height
    spread_taps(taps, terms[..., :height], terms[..., height:])
    split_tile.input_gradient[grid](
        grad,
        x,
        dx,
        *saved,
        dl,
        *norm,
        w.kernel,
        terms,
        taps,
        tiles,
        groups,
        height,
        width,
        *grad.stride(),
        *x.stride(),
        *dx.stride(),
        **cut.sizes(n),
        num_warps=cut.warps,
    )
    found = FoldedWeights(
        torch.matmul(dmix, pooled.mT).sum(0),
        dmix.sum((0, 2)),
        sums[:, :9].sum(0),
        dm.t() @ means,
        dm.sum(0),
        (u * y_dot).sum(0),
        (u * dl_sum).sum(0),
    )
    return found, dl_sum.sum(0)


def _pool(x: Tensor, groups: int, cut: Plan) -> tuple[Tensor, Tensor]:
    """Row and column means (B·G, n, H + W) and shifted means (B·G, 9n) of a split tile."""
    tiles, n, height, width = x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:]
    rows, columns = _line_sums(x, groups, cut)
    grid = tiles, cut.blocks(height, width), triton.cdiv(n, cut.channels)
    split_tile.pool_blocks[grid](
        x,
        rows,
        columns,
        tiles,
        groups,
        height,
        width,
        *x.stride(),
        **cut.sizes(n),
        num_warps=cut.warps,
    )
    row, col = rows.sum(0) / width, columns.sum(0) / height
    # Of the map itself the shifted means need the corner pixels alone.
    corners = x[..., :: max(height - 1, 1), :: max(width - 1, 1)].float()
    corners = corners.reshape(tiles, n, *corners.shape[2:])
    return torch.cat([row, col], -1), shifted_means(corners, row, col).flatten(1)


def _line_sums(x: Tensor, groups: int, cut: Plan) -> tuple[Tensor, Tensor]:
    """Memory for each block's sums along W and along H."""
    tiles, n, height, width = x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:]
    down, across = cut.grid(height, width)
    rows = x.new_empty((across, tiles, n, height), dtype=torch.float32)
    return rows, x.new_empty((down, tiles, n, width), dtype=torch.float32)


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
