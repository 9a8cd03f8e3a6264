"""EMA attention in an exact closed form: no 3×3 convolution over channels, no normalised map.

B batch, C channels, G groups, n = C / G, H height, W width; g is x with its channels split into
(G, n). Notation of the paper's definition in `ema_timm.ops.reference`. Four identities make the
definition cheap without changing it:

a. ``v`` does not depend on the input. ``x1`` leaves an instance norm, so its spatial mean is
   exactly β, and v = softmax(β).
b. The 3×3 convolution collapses to one output channel. With v constant,
   Σ_c v_c·x2_c = conv(g; k) + v·b₃, where k[i, t] = Σ_o v_o·W₃[o, i, t].
c. ``u`` needs no convolution. The spatial mean of a zero-padded 3×3 convolution is linear in nine
   shifted means of g; the mean for tap (dy, dx) is the whole mean without the border row and
   border column that the shift pushes out, plus their common corner.
d. The norm folds into one coefficient a channel:
   Σ_c u_c·x1_c = Σ_c u_c γ_c r_c (y_c − μ_c) + Σ_c u_c β_c, with r = 1/sqrt(var + eps).

Written with reductions, broadcasts and small matrix products on the five-dimensional view
(B, G, n, H, W), which needs no copy in either memory format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.ops.weights import EPS, EmaWeights, FoldedWeights


def constant_channel_weights(gn_bias: Tensor) -> Tensor:
    """Identity a: the softmax weights v of the instance-normed branch, (n,), from β, (n,)."""
    return gn_bias.softmax(0)


def collapsed_kernel(conv3x3_weight: Tensor, gn_bias: Tensor) -> Tensor:
    """Identity b: the n→1 kernel k of the v-weighted 3×3 convolution, (9, n).

    The sum of the softmax divides last. With β = 0 and Σ_o W₃[o] = 0, the identity initialisation,
    k is then exactly 0 for every n; weights v = 1/n would be rounded first and leave a rest.

    Args:
        conv3x3_weight: W₃, (n, n, 3, 3).
        gn_bias: β, (n,).
    """
    n = conv3x3_weight.shape[0]
    v = (gn_bias - gn_bias.detach().amax(0)).exp()  # not divided by its sum yet
    # A sum: over the product of a vector and a matrix counters and converters stumble, and that of
    # two matrices is rounded to TF32 where matrix products are.
    kernel = (v.unsqueeze(1) * conv3x3_weight.reshape(n, n * 9)).sum(0) / v.sum()
    return kernel.view(n, 9).t()


def fold(w: EmaWeights) -> FoldedWeights:
    """Work out the products of weights that every input shares; differentiable."""
    n = w.gn_bias.shape[0]
    v = constant_channel_weights(w.gn_bias)
    return FoldedWeights(
        w.conv1x1_weight.reshape(n, n),
        w.conv1x1_bias,
        collapsed_kernel(w.conv3x3_weight, w.gn_bias),
        w.conv3x3_weight.reshape(n, 9 * n),
        w.conv3x3_bias,
        w.gn_weight,
        w.gn_bias + (v * w.conv3x3_bias).sum(),
    )


def cross_spatial_weights(means: Tensor, w: FoldedWeights) -> Tensor:
    """The softmax weights u of the local branch, (..., n), from shifted means, (..., 9n)."""
    return (means @ w.vote_weight.t() + w.vote_bias).softmax(-1)


def shifted_means(g: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Identity c: means of ``g`` over what each tap of a zero-padded 3×3 kernel sees.

    Args:
        g: (..., n, H, W).
        row: Means of ``g`` over W, (..., n, H).
        col: Means of ``g`` over H, (..., n, W).

    Returns:
        (..., n, 9), tap (dy, dx) at index 3·(dy + 1) + dx + 1.
    """
    height, width = row.shape[-1], col.shape[-1]
    total = row.mean(-1)
    # What a shift by dy = -1, 0, +1 pushes out: the last row, nothing, the first row.
    rows = [row[..., -1] / height, None, row[..., 0] / height]
    cols = [col[..., -1] / width, None, col[..., 0] / width]
    taps = []
    for i in range(3):
        for j in range(3):
            mean = total
            out_row, out_col = rows[i], cols[j]
            if out_row is not None:
                mean = mean - out_row
            if out_col is not None:
                mean = mean - out_col
            if out_row is not None and out_col is not None:
                corner = g[..., -1 if i == 0 else 0, -1 if j == 0 else 0]
                mean = mean + corner / (height * width)
            taps.append(mean)
    return torch.stack(taps, -1)


def convolve_to_one_channel(g: Tensor, kernel: Tensor) -> Tensor:
    """Zero-padded 3×3 convolution n→1: nine products summed over channels, then shifted adds.

    Args:
        g: (B, G, n, H, W).
        kernel: (9, n).

    Returns:
        (B, G, H, W).
    """
    height, width = g.shape[3], g.shape[4]
    taps = torch.matmul(kernel, g.flatten(3)).unflatten(3, (height, width))  # (B, G, 9, H, W)
    taps = F.pad(taps, (1, 1, 1, 1))
    out = taps[:, :, 4, 1 : height + 1, 1 : width + 1]
    for t in range(9):
        if t != 4:
            i, j = t // 3, t % 3
            out = out + taps[:, :, t, i : i + height, j : j + width]
    return out


def convolve_by_sums(g: Tensor, kernel: Tensor) -> Tensor:
    """`convolve_to_one_channel` for Inductor, which fuses the nine sums into one pass over ``g``.

    Inductor calls a library for a product of matrices and writes ``g`` out in float32 before it.
    Without operator fusion, sums are nine passes. Each sum has its own pad, because the gradients
    of nine crops of one padded map are nine such maps, written out and added up.
    """
    out = (g * kernel[4][:, None, None]).sum(2)
    for t in range(9):
        if t != 4:
            i, j = t // 3, t % 3
            tap = (g * kernel[t][:, None, None]).sum(2)
            out = out + F.pad(tap, (1 - j, j - 1, 1 - i, i - 1))
    return out


def pools_and_gates(g: Tensor, w: FoldedWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of ``g`` over W, (B, G, n, H), and over H, (B, G, n, W), and the gates of both."""
    height = g.shape[3]
    row = g.mean(4)  # (B, G, n, H)
    col = g.mean(3)  # (B, G, n, W)
    mixed = torch.matmul(w.mix_weight, torch.cat([row, col], -1))
    gates = (mixed + w.mix_bias[:, None]).sigmoid()
    return row, col, gates[..., :height], gates[..., height:]


def gate_logits(g: Tensor, w: FoldedWeights, eps: float = EPS) -> Tensor:
    """The logits L of the gate, (B, G, H, W), for ``g`` of (B, G, n, H, W)."""
    row, col, gate_h, gate_w = pools_and_gates(g, w)

    # Centred before squaring: E[y²] − μ² cancels where the mean is large.
    y = g * gate_h[..., None] * gate_w[..., None, :]
    centred = y - y.mean((3, 4), keepdim=True)
    r = (centred.square().mean((3, 4)) + eps).rsqrt()  # (B, G, n)
    u = cross_spatial_weights(shifted_means(g, row, col).flatten(2), w)  # (B, G, n)

    coef = u * w.gn_weight * r
    # A product, also for counters of operations: they see none in a sum.
    normed = torch.matmul(coef.unsqueeze(2), centred.flatten(3)).squeeze(2)
    normed = normed.unflatten(2, (g.shape[3], g.shape[4]))
    local = convolve_to_one_channel(g, w.kernel)
    return normed + local + (u * w.gn_bias).sum(-1)[..., None, None]


def gate_logits_by_sums(g: Tensor, w: FoldedWeights, eps: float = EPS) -> Tensor:
    """`gate_logits` for Inductor on a GPU: no product of matrices with the map.

    u comes before the centred map, because Inductor keeps a map in float32 that is used again after
    a product of matrices, instead of computing it again. The gates are multiplied first, because
    from the left g·s_h·s_w would leave g·s_h, a map to keep and to read three times in the
    backward.
    """
    row, col, gate_h, gate_w = pools_and_gates(g, w)
    u = cross_spatial_weights(shifted_means(g, row, col).flatten(2), w)  # (B, G, n)
    local = convolve_by_sums(g, w.kernel)

    y = g * (gate_h[..., None] * gate_w[..., None, :])
    centred = y - y.mean((3, 4), keepdim=True)
    r = (centred.square().mean((3, 4)) + eps).rsqrt()  # (B, G, n)
    coef = u * w.gn_weight * r
    normed = (centred * coef[..., None, None]).sum(2)
    return normed + local + (u * w.gn_bias).sum(-1)[..., None, None]


def closed_form(x: Tensor, weights: EmaWeights, groups: int, for_inductor: bool = False) -> Tensor:
    """Efficient Multi-scale Attention in closed form, of plain operations that trace anywhere.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.
        for_inductor: Write it so that Inductor fuses most, see `gate_logits_by_sums`.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    w = fold(statistics_type(x, weights))
    batch, channels, height, width = x.shape
    g = x.view(batch, groups, channels // groups, height, width).to(w.gn_weight.dtype)
    logits = gate_logits_by_sums(g, w) if for_inductor else gate_logits(g, w)
    gated = (g * logits.sigmoid().unsqueeze(2)).to(x.dtype)
    if torch.jit.is_tracing():  # neither the tracer nor the legacy ONNX exporter knows the other
        return gated.flatten(1, 2)
    # A plain flatten is a view in autograd's books, and ResNet adds the shortcut in place: hooks
    # on the output (Grad-CAM) would then miss their gradient. This one owns its history.
    return torch.ops.aten._unsafe_view(gated, x.shape)


def statistics_type(x: Tensor, w: EmaWeights) -> EmaWeights:
    """The weights in the type of the statistics: float32, or float64 for float64 input."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.jit.is_scripting() and not torch.is_grad_enabled():
        # A scripted network that has trained keeps what a backward of it would need wherever a
        # parameter asks for gradients, and fails on that in inference mode.
        w = EmaWeights(
            w.conv1x1_weight.detach(),
            w.conv1x1_bias.detach(),
            w.conv3x3_weight.detach(),
            w.conv3x3_bias.detach(),
            w.gn_weight.detach(),
            w.gn_bias.detach(),
        )
    return EmaWeights(
        w.conv1x1_weight.to(dtype),
        w.conv1x1_bias.to(dtype),
        w.conv3x3_weight.to(dtype),
        w.conv3x3_bias.to(dtype),
        w.gn_weight.to(dtype),
        w.gn_bias.to(dtype),
    )
