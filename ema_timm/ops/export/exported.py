"""The closed form as exporters, tracers and the script compiler see it: for runtimes.

The identities are those of `ema_timm.ops.formula`. A runtime pays for every operator
and every pass over the map, so that there are few of both; Inductor, which fuses, sees `formula`.

B batch, C channels, G groups, n = C / G, T = B·G tiles, H height, W width. Identity c in nine
edge features instead of nine taps: along each axis the whole, the first and the last row or
column, E[a, b], because a tap sees the whole less the end that its shift pushes out. The map from
features to taps is a product of weights.

Two ways where runtimes differ, chosen by who exports. ONNX has one operator for the instance norm
and one, the transposed convolution, that is a matrix product with shifted adds; ONNX Runtime has
both fast. PyTorch itself and OpenVINO do not, and get sums and shifted adds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.formula import fold, statistics_type
from ema_timm.ops.weights import EPS, EmaWeights, FoldedWeights


class ExportedWeights(NamedTuple):
    """Folded weights in the shapes in which the graph takes them.

    Attributes:
        mix_weight: The 1×1 convolution, (n, n, 1, 1).
        mix_bias: (n,).
        kernel: The collapsed 3×3 convolution as a transposed one: turned by half a turn,
            (n, 1, 3, 3).
        vote_weight: Makes the logits of u from the edge features, (9n, n).
        vote_bias: (n,).
        gn_weight: γ, (n,).
        gn_bias: β + v·b₃, (n,).
    """

    mix_weight: Tensor
    mix_bias: Tensor
    kernel: Tensor
    vote_weight: Tensor
    vote_bias: Tensor
    gn_weight: Tensor
    gn_bias: Tensor


class SmallMap(NamedTuple):
    """Pooling and its opposite as matrix products, for maps of one small size.

    Attributes:
        pool: A tile's map to row means, column means and edge features, (HW, H + W + 9).
        spread_h: Gates along the height to a whole map, (H, HW).
        spread_w: Gates along the width to a whole map, (W, HW).
    """

    pool: Tensor
    spread_h: Tensor
    spread_w: Tensor


def arrange(w: FoldedWeights) -> ExportedWeights:
    """Work out `ExportedWeights`; products of weights alone."""
    n = w.gn_bias.shape[0]
    left_out = n - w.vote_bias.shape[0]  # a row left out votes 0
    taps = F.pad(w.vote_weight, (0, 0, left_out, 0)).reshape(n, n, 3, 3)
    # Every tap sees the whole; +1 all but the first row or column, -1 all but the last.
    ends = torch.cat([taps.sum(2, keepdim=True), -taps[:, :, 2:], -taps[:, :, :1]], 2)
    ends = torch.cat([ends.sum(3, keepdim=True), -ends[:, :, :, 2:], -ends[:, :, :, :1]], 3)
    return ExportedWeights(
        w.mix_weight.reshape(n, n, 1, 1),
        w.mix_bias,
        w.kernel.t().reshape(n, 1, 3, 3).flip([2, 3]),
        ends.reshape(n, 9 * n).t(),
        F.pad(w.vote_bias, (left_out, 0)),
        w.gn_weight,
        w.gn_bias,
    )


def small_map(height: int, width: int) -> SmallMap:
    """The matrices of `SmallMap`, float64."""
    rows = torch.eye(height, dtype=torch.float64)
    columns = torch.eye(width, dtype=torch.float64)
    over_h, over_w = rows.sum(1, keepdim=True) / height, columns.sum(1, keepdim=True) / width
    ends_h, ends_w = (
        torch.cat([over, over * side[:, :1], over * side[:, -1:]], 1)
        for over, side in ((over_h, rows), (over_w, columns))
    )
    pairs = ((rows, over_w), (over_h, columns), (ends_h, ends_w))
    return SmallMap(
        torch.cat([torch.kron(a, b) for a, b in pairs], 1),
        torch.kron(rows, columns.sum(0, keepdim=True)),
        torch.kron(rows.sum(0, keepdim=True), columns),
    )


def exported(
    x: Tensor,
    w: ExportedWeights,
    groups: int,
    small: SmallMap | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """EMA attention in few operators.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        w: Arranged weights in the type of the statistics.
        groups: G; divides C.
        small: Matrices of this H and W where the sizes are known and small.
        size: H and W where they are known, for a graph that takes no other: nothing checks them.

    Returns:
        (B, C, H, W), the dtype of ``x``.
    """
    n, height, width = w.gn_weight.shape[0], x.shape[2], x.shape[3]
    if size is not None:  # numbers leave no arithmetic on shapes where the batch is free
        height, width = size
    wide = x if x.dtype == w.gn_weight.dtype else x.to(w.gn_weight.dtype)
    g = wide.reshape(-1, n, height, width)
    if small is None:
        y, features = _gated(g, w, height, width)
    else:
        y, features = _gated_small(_flat(g, n, height, width), w, small, height, width)
    u = (torch.matmul(features, w.vote_weight) + w.vote_bias).softmax(1).unsqueeze(1)  # (T, 1, n)
    logits = _normed(y, u, w) + _flat(_convolved(g, w.kernel), 1, height, width)
    gate = logits.sigmoid()  # (T, 1, HW)
    if _for_onnx():
        gated = g * gate.reshape(-1, 1, height, width)
        gated = gated.view_as(x) if size is None else gated.view(-1, groups * n, height, width)
        return gated if gated.dtype == x.dtype else gated.to(x.dtype)
    # On the view of five dimensions the product keeps the memory format of x.
    tiles = wide.view(-1, groups, n, height, width)
    gated = tiles * gate.view(-1, groups, 1, height, width)
    gated = gated if gated.dtype == x.dtype else gated.to(x.dtype)
    if torch.jit.is_tracing():  # the tracer does not know the other
        return gated.flatten(1, 2)
    # No view in autograd's books, because ResNet adds the shortcut in place; as in `formula`.
    return torch.ops.aten._unsafe_view(gated, x.shape)


def closed_form_exported(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """`exported` from the layer's own weights.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype of ``x``.
    """
    return exported(x, arrange(fold(statistics_type(x, weights))), groups)


def _for_onnx() -> bool:
    if not torch.jit.is_scripting():  # the script compiler reads no further
        return torch.onnx.is_in_onnx_export()
    return False


def _flat(maps: Tensor, channels: int, height: int, width: int) -> Tensor:
    """(T, channels, H, W) as (T, channels, HW)."""
    if _for_onnx():  # which writes a flattening of the last axes as four operators
        return maps.reshape(-1, channels, height * width)
    return maps.flatten(2)


def _gated(g: Tensor, w: ExportedWeights, height: int, width: int) -> tuple[Tensor, Tensor]:
    """y, (T, n, HW), and the edge features, (T, 9n), of ``g``, (T, n, H, W)."""
    row, col = g.mean(3, keepdim=True), g.mean(2, keepdim=True)  # (T, n, H, 1), (T, n, 1, W)
    ends = torch.cat([col, torch.cat([g[:, :, :1], g[:, :, -1:]], 2) / height], 2)  # (T, n, 3, W)
    ends_w = torch.cat([ends[:, :, :, :1], ends[:, :, :, -1:]], 3) / width
    features = torch.cat([ends.mean(3, keepdim=True), ends_w], 3).flatten(1)
    if _for_onnx():
        gate_h = F.conv2d(row, w.mix_weight, w.mix_bias).sigmoid()
        gate_w = F.conv2d(col, w.mix_weight, w.mix_bias).sigmoid()
    else:
        gate_h, gate_w = _mixed(row.squeeze(3), w).unsqueeze(3), _mixed(col.squeeze(2), w)
        gate_w = gate_w.unsqueeze(2)
    # The outer product first: runtimes are slow where a factor is spread over short rows.
    return _flat(g * (gate_h * gate_w), w.gn_weight.shape[0], height, width), features


def _gated_small(
    g: Tensor, w: ExportedWeights, small: SmallMap, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """`_gated` by matrix products, of ``g`` as (T, n, HW)."""
    pooled = torch.matmul(g, small.pool)  # (T, n, H + W + 9)
    gates = _mixed(pooled[:, :, : height + width], w)
    gate_h = torch.matmul(gates[:, :, :height], small.spread_h)
    gate_w = torch.matmul(gates[:, :, height:], small.spread_w)
    return g * gate_h * gate_w, pooled[:, :, height + width :].flatten(1)


def _mixed(pooled: Tensor, w: ExportedWeights) -> Tensor:
    """Gates from means, (T, n, ·)."""
    mixed = torch.matmul(w.mix_weight.flatten(1), pooled)
    # Added by a subtraction: NNCF takes what is added to a product for the bias of its last axis.
    return (mixed - w.mix_bias.neg().unsqueeze(1)).sigmoid()


def _normed(y: Tensor, u: Tensor, w: ExportedWeights, eps: float = EPS) -> Tensor:
    """Σ_c u_c·x1_c, (T, 1, HW), from y, (T, n, HW), and u, (T, 1, n)."""
    if _for_onnx():
        normed = torch.instance_norm(y, w.gn_weight, w.gn_bias, None, None, True, 0.0, eps, False)
        return torch.matmul(u, normed)
    centred = y - y.mean(2, keepdim=True)
    r = (centred.square().mean(2) + eps).rsqrt().unsqueeze(1)
    return torch.matmul(u * (w.gn_weight * r), centred) + (u * w.gn_bias).sum(2, keepdim=True)


def _convolved(g: Tensor, kernel: Tensor) -> Tensor:
    """The collapsed 3×3 convolution of ``g``, (T, n, H, W), as (T, 1, H, W)."""
    if _for_onnx():
        return F.conv_transpose2d(g, kernel, padding=1)
    # Nine products, added along the rows first, so that three maps are left to add along columns.
    height, width = g.shape[2], g.shape[3]
    taps = torch.matmul(kernel.flatten(1).t(), g.flatten(2)).view(-1, 9, height, width)
    right, left = F.pad(taps[:, 2::3], [1, 0]), F.pad(taps[:, 0::3], [0, 1])
    rows = taps[:, 1::3] + right[:, :, :, :width] + left[:, :, :, 1:]
    below, above = F.pad(rows[:, 2:], [0, 0, 1, 0]), F.pad(rows[:, :1], [0, 0, 0, 1])
    return rows[:, 1:2] + below[:, :, :height] + above[:, :, 1:]
