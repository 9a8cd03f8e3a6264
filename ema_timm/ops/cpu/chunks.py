"""The closed form in PyTorch operators on chunks of tiles, without autograd.

It runs where the C kernel cannot: without a compiler, in float64, on devices other than CUDA.

Same identities as `ema_timm.ops.formula`. Each tile (one group of one sample) is independent of
the others. The work is therefore cut into chunks of tiles that stay in the cache from the first
pass to the last: no map between two passes is larger than one chunk.

The backward of one chunk is in `chunks_backward`. T tiles of one chunk, n channels of a group, H
height, W width. README.md here has the measurements behind each choice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ema_timm.ops.cpu.chunks_backward import TileSums, add_convolution, backward_chunk
from ema_timm.ops.formula import cross_spatial_weights, fold, shifted_means
from ema_timm.ops.saved import Saved, finish_weights, new_saved
from ema_timm.ops.weights import EPS, EmaWeights, FoldedWeights

CHUNK = 1 << 19
"""Numbers of the input in one chunk, 2 MiB in float32."""


def forward(
    x: Tensor, weights: FoldedWeights, groups: int, save: bool
) -> tuple[Tensor, Saved | None]:
    """Gate ``x``.

    Args:
        x: (B, C, H, W), floating point, any strides.
        weights: Folded parameters in the type of the statistics.
        groups: G; divides C.
        save: Whether a backward will follow.

    Returns:
        The gated map, laid out like ``x``, and what `backward` needs, or None.
    """
    out = torch.empty_like(x)
    saved = None
    if save:
        saved = new_saved(x, groups, weights.gn_weight.dtype)
    for tiles, g, gated in _chunks(groups, x, out):
        kept = _forward_chunk(g, weights, gated)
        if saved is not None:
            saved.gates[tiles], saved.gate_map[tiles] = kept.gates, kept.gate_map
            saved.vectors[:, tiles] = kept.vectors
    return out, saved


def _forward_chunk(g: Tensor, w: FoldedWeights, out: Tensor) -> Saved:
    """One chunk: ``g`` (T, n, H, W) to ``out``; returns what `Saved` keeps of these T tiles."""
    g = g.to(w.gn_weight.dtype)
    height, width = g.shape[2], g.shape[3]
    row, col = g.mean(3), g.mean(2)  # (T, n, H), (T, n, W)
    gates = torch.matmul(w.mix_weight, torch.cat([row, col], -1)).add_(w.mix_bias[:, None])
    gates.sigmoid_()
    gate_h, gate_w = gates[..., :height, None], gates[..., None, height:]

    y = torch.mul(g, gate_h).mul_(gate_w)
    mean = y.mean((2, 3), keepdim=True)
    y.sub_(mean)
    # The rounded mean leaves a residual, which r would magnify 316 times on a constant channel.
    rest = y.mean((2, 3))
    # The norm of the centred map: var_mean needs many times as long for the same number.
    var = torch.linalg.vector_norm(y, dim=(2, 3)).square_().div_(height * width)
    # Squares of numbers over 1e19 are infinite, and so is the variance: r is 0.
    offset = rest.square().clamp_(max=torch.finfo(rest.dtype).max)
    r = var.sub_(offset).clamp_(min=0).add_(EPS).rsqrt_()
    u = cross_spatial_weights(shifted_means(g, row, col).flatten(1), w)  # (T, n)

    coef = u * w.gn_weight * r
    logits = torch.matmul(coef[:, None], y.flatten(2)).view(-1, height, width)
    del y
    add_convolution(logits, g, w.kernel)
    logits.add_((u @ w.gn_bias - (coef * rest).sum(1))[:, None, None])
    gate_map = logits.sigmoid_()
    if g.dtype == out.dtype:
        torch.mul(g, gate_map[:, None], out=out)
    else:
        out.copy_(g.mul_(gate_map[:, None]))  # g is a copy in the type of the statistics
    return Saved(gates, gate_map, torch.stack([mean[..., 0, 0], rest, r, u]))


def backward(
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    weights: EmaWeights,
    groups: int,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, EmaWeights | None]:
    """Gradients of `forward` in closed form.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        x: The input, (B, C, H, W).
        saved: From `forward`.
        weights: Parameters in the type of the statistics.
        groups: G.
        need_x: Whether the gradient of ``x`` is needed.
        need_weights: Whether the gradients of the parameters are needed.

    Returns:
        The gradient of ``x`` in its type and layout, and those of the parameters; None where not
        needed.
    """
    folded = fold(weights)
    dx = torch.empty_like(x) if need_x else None
    total = TileSums(folded)
    for tiles, g, d, dg in _chunks(groups, x, grad, dx):
        kept = Saved(saved.gates[tiles], saved.gate_map[tiles], saved.vectors[:, tiles])
        backward_chunk(g, d, kept, folded, dg, total)
    return dx, finish_weights(total.folded(), total.logits, weights) if need_weights else None


def _chunks(groups: int, *maps: Tensor | None) -> Iterator[tuple]:
    """Cut maps of one shape (B, C, H, W) into (slice of tiles, *views of (T, n, H, W)).

    Contiguous maps are cut anywhere between tiles. In other layouts the tiles of two samples have
    no common stride, so a sample is the largest chunk.
    """
    first = maps[0]
    batch, channels, height, width = first.shape
    n = channels // groups
    # A GPU hides nothing in its cache that would pay for launching every operator many times.
    size = CHUNK if first.device.type == "cpu" else first.numel()
    step = max(1, size // max(1, n * height * width))
    if all(m is None or m.is_contiguous() for m in maps):
        flat = [m if m is None else m.view(batch * groups, n, height, width) for m in maps]
        for i in range(0, batch * groups, step):
            tiles = slice(i, min(i + step, batch * groups))
            yield tiles, *[m if m is None else m[tiles] for m in flat]
        return
    for b in range(batch):
        sample = [m if m is None else m[b].unflatten(0, (groups, n)) for m in maps]
        for i in range(0, groups, step):
            j = min(i + step, groups)
            yield (
                slice(b * groups + i, b * groups + j),
                *[m if m is None else m[i:j] for m in sample],
            )
