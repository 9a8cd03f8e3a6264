"""`exported` for PyTorch's own runtimes: scripted files and programs of ``torch.export``.

A new map costs PyTorch more than a pass over an old one: its memory comes fresh from the system,
one page fault for every 4 KiB. So steps that need not keep their input write over it, and the
shifts of the convolution are added into views. Other runtimes plan their memory, and converters
stumble over writes into views. All stays differentiable: nothing is overwritten that a backward
of PyTorch's keeps.

The letters are those of `ema_timm.ops.export.exported`, whose weights these are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.export.exported import ExportedWeights, SmallMap
from ema_timm.ops.weights import EPS


def exported_in_place(
    x: Tensor, w: ExportedWeights, groups: int, small: SmallMap | None = None, eps: float = EPS
) -> Tensor:
    """EMA attention in few operators and few new maps.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        w: Arranged weights in the type of the statistics.
        groups: G; divides C.
        small: Matrices of this H and W where the sizes are known and small.
        eps: Added to the variance.

    Returns:
        (B, C, H, W), the dtype of ``x``.
    """
    n, height, width = w.gn_weight.shape[0], x.shape[2], x.shape[3]
    wide = x if x.dtype == w.gn_weight.dtype else x.to(w.gn_weight.dtype)
    g = wide.reshape(-1, n, height, width)
    flat = g.flatten(2)
    if small is None:
        y, features = _gated(g, w)
    else:
        y, features = _gated_small(flat, w, small, height, width)
    y = y.sub_(y.mean(2, keepdim=True))
    spread = torch.norm(y, 2, [2])  # a mean of squares would be one more map
    r = (spread * spread).div_(y.shape[2]).add_(eps).rsqrt()
    u = torch.addmm(w.vote_bias, features, w.vote_weight).softmax(1)  # (T, n)
    weight = (u * r).mul_(w.gn_weight).unsqueeze(1)
    shift = torch.mv(u, w.gn_bias).unsqueeze(1).unsqueeze(2)
    logits = torch.baddbmm(_convolved(g, flat, w.kernel), weight, y)
    gate = logits.add_(shift).sigmoid_()  # (T, 1, HW)
    # On the view of five dimensions the product keeps the memory format of x.
    tiles = wide.view(-1, groups, n, height, width)
    gated = tiles * gate.view(-1, groups, 1, height, width)
    gated = gated if gated.dtype == x.dtype else gated.to(x.dtype)
    if torch.jit.is_tracing():  # the tracer does not know the other
        return gated.flatten(1, 2)
    # No view in autograd's books, because ResNet adds the shortcut in place; as in `formula`.
    return torch.ops.aten._unsafe_view(gated, x.shape)


def _gated(g: Tensor, w: ExportedWeights) -> tuple[Tensor, Tensor]:
    """y, (T, n, HW), and the edge features, (T, 9n), of ``g``, (T, n, H, W)."""
    height, width = g.shape[2], g.shape[3]
    row, col = g.mean(3), g.mean(2)  # (T, n, H), (T, n, W)
    gates = _mixed(torch.cat([row, col], 2), w)
    gate_h, gate_w = gates.narrow(2, 0, height), gates.narrow(2, height, width)
    ends = [g.narrow(2, 0, 1) / height, g.narrow(2, -1, 1) / height]
    over = torch.cat([col.unsqueeze(2), ends[0], ends[1]], 2)  # (T, n, 3, W)
    ends = [over.narrow(3, 0, 1) / width, over.narrow(3, -1, 1) / width]
    features = torch.cat([over.mean(3, keepdim=True), ends[0], ends[1]], 3).flatten(1)
    y = (gate_h.unsqueeze(3) * gate_w.unsqueeze(2)).mul_(g)
    return y.flatten(2), features


def _gated_small(
    flat: Tensor, w: ExportedWeights, small: SmallMap, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """`_gated` by matrix products, of ``flat``, (T, n, HW)."""
    pooled = torch.matmul(flat, small.pool)  # (T, n, H + W + 9)
    gates = _mixed(pooled.narrow(2, 0, height + width), w)
    gate_h = torch.matmul(gates.narrow(2, 0, height), small.spread_h)
    gate_w = torch.matmul(gates.narrow(2, height, width), small.spread_w)
    return (gate_h * flat).mul_(gate_w), pooled.narrow(2, height + width, 9).flatten(1)


def _mixed(pooled: Tensor, w: ExportedWeights) -> Tensor:
    """Gates from means, (T, n, ·)."""
    n = w.mix_bias.shape[0]
    mix = w.mix_weight.view(1, n, n).expand(pooled.shape[0], n, n)
    return torch.baddbmm(w.mix_bias.unsqueeze(1), mix, pooled).sigmoid_()


def _convolved(g: Tensor, flat: Tensor, kernel: Tensor) -> Tensor:
    """The collapsed 3×3 convolution of ``g``, (T, n, H, W), as (T, 1, HW)."""
    n, height, width = g.shape[1], g.shape[2], g.shape[3]
    taps = torch.bmm(kernel.view(1, n, 9).mT.expand(g.shape[0], 9, n), flat)
    taps = taps.view(-1, 3, 3, height, width)
    # Padded on one side and cut on the other; a slice of W - 1 would exclude W = 2 from programs.
    rows = taps.select(2, 1).add_(F.pad(taps.select(2, 2), [1, -1]))  # (T, 3, H, W)
    rows = rows.add_(F.pad(taps.select(2, 0), [-1, 1]))
    local = rows.narrow(1, 1, 1).add_(F.pad(rows.narrow(1, 2, 1), [0, 0, 1, -1]))
    return local.add_(F.pad(rows.narrow(1, 0, 1), [0, 0, -1, 1])).flatten(2)
