"""The closed form in few operators, for runtimes: one derivation in four dialects.

The identities are those of `ema_timm.ops.formula`. A runtime pays for every operator and for every
pass over the map, so there are few of both. (Inductor fuses operators, so it gets `formula`.)
Identity c uses nine edge features instead of nine taps: along each axis the mean over the whole,
and the first and the last row or column, E[a, b]. A tap sees the whole except the end that its
shift pushes out, so a product of weights turns features into taps.

A dialect chooses the operators that a kind of runtime executes fast. It is a module without
parameters: TorchScript compiles it, and `closed_form_exported` calls it on a layer's own weights.

B batch, C channels, G groups, n = C / G, T = B·G tiles, H height, W width. g is the input as
tiles, (T, n, H, W), y the gated tiles, (T, n, HW), and u the cross-spatial weights, (T, n).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ema_timm.ops.export.weights import ExportedWeights, SmallMap, arrange
from ema_timm.ops.formula import fold, statistics_type
from ema_timm.ops.weights import EPS, EmaWeights


class Shape(NamedTuple):
    """How a feature map is split into tiles.

    Attributes:
        groups: G.
        n: C / G.
        height: H.
        width: W.
        fixed: Whether the graph is for this H and W only.
    """

    groups: int
    n: int
    height: int
    width: int
    fixed: bool


class Plain(nn.Module):
    """Operators that every converter supports; the dialect for OpenVINO.

    It keeps to four dimensions and to slices without a step, because ncnn supports no others.
    """

    SMALL_PIXELS = 64
    """Largest map, H·W, that is pooled by a matrix product if its size is fixed."""

    def __init__(self):
        super().__init__()
        self.eps = EPS  # TorchScript reads attributes, but not the module's constants

    def forward(
        self,
        x: Tensor,
        w: ExportedWeights,
        groups: int,
        small: SmallMap | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Compute EMA attention.

        Args:
            x: Feature map, (B, C, H, W), floating point.
            w: Arranged weights in the type of the statistics.
            groups: G; divides C.
            small: The matrices for this H and W, if both are fixed and small.
            size: H and W, if the graph is for this size only. Nothing checks them.

        Returns:
            (B, C, H, W), the dtype of ``x``.
        """
        n, height, width = w.gn_weight.shape[0], x.shape[2], x.shape[3]
        if size is not None:  # numbers leave no arithmetic on shapes if the batch is free
            height, width = size
        shape = Shape(groups, n, height, width, size is not None)
        wide = x if x.dtype == w.gn_weight.dtype else x.to(w.gn_weight.dtype)
        g = wide.reshape(-1, n, height, width)
        flat = self._flat(g, n, shape)
        if small is None:
            y, features = self._gated(g, w, shape)
        else:
            y, features = self._gated_small(flat, w, small, shape)
        gate = self._gate(y, features, self._convolved(g, flat, w, shape), w)
        gated = self._times_gate(x, wide, g, gate, shape)
        return gated if gated.dtype == x.dtype else gated.to(x.dtype)

    def _flat(self, maps: Tensor, channels: int, shape: Shape) -> Tensor:
        """(T, channels, H, W) as (T, channels, HW)."""
        return maps.flatten(2)

    def _gated(self, g: Tensor, w: ExportedWeights, shape: Shape) -> tuple[Tensor, Tensor]:
        """The gated tiles and the edge features, (T, 9n)."""
        row, col = g.mean(3), g.mean(2, keepdim=True)  # (T, n, H), (T, n, 1, W)
        gate_h = self._directional_gates(row, w).unsqueeze(3)
        gate_w = self._directional_gates(col.squeeze(2), w).unsqueeze(2)
        # The outer product first: runtimes are slow if a factor is broadcast over short rows.
        return (g * (gate_h * gate_w)).flatten(2), self._edges(g, col, shape)

    def _gated_small(
        self, flat: Tensor, w: ExportedWeights, small: SmallMap, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """`_gated` by matrix products, from g as (T, n, HW)."""
        ends = shape.height + shape.width
        pooled = torch.matmul(flat, small.pool)  # (T, n, H + W + 9)
        gates = self._directional_gates(pooled[:, :, :ends], w)
        gate_h = torch.matmul(gates[:, :, : shape.height], small.spread_h)
        gate_w = torch.matmul(gates[:, :, shape.height :], small.spread_w)
        return flat * gate_h * gate_w, pooled[:, :, ends:].flatten(1)

    def _directional_gates(self, means: Tensor, w: ExportedWeights) -> Tensor:
        """Gates along an axis from the means over the other, (T, n, ·)."""
        mixed = torch.matmul(w.mix_weight.flatten(1), means)
        # A subtraction: NNCF takes what is added to a product for the bias of its last axis.
        return (mixed - w.mix_bias.neg().unsqueeze(1)).sigmoid()

    def _edges(self, g: Tensor, col: Tensor, shape: Shape) -> Tensor:
        """E[a, b], (T, 9n), from g and its means over H, (T, n, 1, W)."""
        over = torch.cat([col, torch.cat([g[:, :, :1], g[:, :, -1:]], 2) / shape.height], 2)
        ends = torch.cat([over[:, :, :, :1], over[:, :, :, -1:]], 3) / shape.width
        return torch.cat([over.mean(3, keepdim=True), ends], 3).flatten(1)

    def _convolved(self, g: Tensor, flat: Tensor, w: ExportedWeights, shape: Shape) -> Tensor:
        """The collapsed 3×3 convolution, (T, 1, HW), as products and shifted sums.

        Sums along rows come first, so that only three maps are left to shift along columns.
        """
        kernel = w.kernel.transpose(2, 3).flatten(1).t()  # (9, n), columns before rows
        taps = torch.matmul(kernel, flat).view(-1, 9, shape.height, shape.width)
        right, left = F.pad(taps[:, 6:], [1, 0]), F.pad(taps[:, :3], [0, 1])
        rows = taps[:, 3:6] + right[:, :, :, : shape.width] + left[:, :, :, 1:]
        below, above = F.pad(rows[:, 2:], [0, 0, 1, 0]), F.pad(rows[:, :1], [0, 0, 0, 1])
        return (rows[:, 1:2] + below[:, :, : shape.height] + above[:, :, 1:]).flatten(2)

    def _gate(self, y: Tensor, features: Tensor, local: Tensor, w: ExportedWeights) -> Tensor:
        """The gate, (T, 1, HW)."""
        # The bias first: pnnx fuses one that follows a product, which ncnn does not load if n is 1.
        u = (w.vote_bias + torch.matmul(features, w.vote_weight)).softmax(1).unsqueeze(1)
        centred = y - y.mean(2, keepdim=True)
        r = (centred.square().mean(2) + self.eps).rsqrt().unsqueeze(1)
        normed = torch.matmul(u * (w.gn_weight * r), centred)
        return (normed + (u * w.gn_bias).sum(2, keepdim=True) + local).sigmoid()

    def _times_gate(self, x: Tensor, wide: Tensor, g: Tensor, gate: Tensor, shape: Shape) -> Tensor:
        """``x`` times its gate, (B, C, H, W); ``wide`` and g are ``x`` in the type of the gate."""
        # Split like this and not as tiles, the product keeps the memory format of x.
        pixels = shape.height * shape.width
        tiles = wide.reshape(-1, shape.groups, shape.n, pixels)
        gated = tiles * gate.view(-1, shape.groups, 1, pixels)
        if torch.jit.is_tracing():  # the tracer does not know the operator below
            return gated.reshape(x.shape)
        # Autograd must not see a view, because ResNet adds the shortcut in place; as in `formula`.
        return torch.ops.aten._unsafe_view(gated, x.shape)


class Onnx(Plain):
    """Operators that are fast in ONNX Runtime.

    The instance norm is one operator, and so is the transposed convolution, a matrix product with
    shifted sums. Flattening the last axes would be four.
    """

    SMALL_PIXELS = 256

    def _flat(self, maps: Tensor, channels: int, shape: Shape) -> Tensor:
        return maps.reshape(-1, channels, shape.height * shape.width)

    def _gated(self, g: Tensor, w: ExportedWeights, shape: Shape) -> tuple[Tensor, Tensor]:
        row, col = g.mean(3, keepdim=True), g.mean(2, keepdim=True)  # (T, n, H, 1), (T, n, 1, W)
        gate_h = F.conv2d(row, w.mix_weight, w.mix_bias).sigmoid()
        gate_w = F.conv2d(col, w.mix_weight, w.mix_bias).sigmoid()
        return self._flat(g * (gate_h * gate_w), shape.n, shape), self._edges(g, col, shape)

    def _convolved(self, g: Tensor, flat: Tensor, w: ExportedWeights, shape: Shape) -> Tensor:
        return self._flat(F.conv_transpose2d(g, w.kernel, padding=1), 1, shape)

    def _gate(self, y: Tensor, features: Tensor, local: Tensor, w: ExportedWeights) -> Tensor:
        u = (torch.matmul(features, w.vote_weight) + w.vote_bias).softmax(1).unsqueeze(1)
        x1 = torch.instance_norm(y, w.gn_weight, w.gn_bias, None, None, True, 0.0, self.eps, False)
        return (torch.matmul(u, x1) + local).sigmoid()

    def _times_gate(self, x: Tensor, wide: Tensor, g: Tensor, gate: Tensor, shape: Shape) -> Tensor:
        gated = g * gate.reshape(-1, 1, shape.height, shape.width)
        if shape.fixed:
            return gated.view(-1, shape.groups * shape.n, shape.height, shape.width)
        return gated.view_as(x)


class InPlace(Plain):
    """Operators that overwrite their input, for TorchScript and programs of ``torch.export``.

    A new map costs PyTorch more than a pass over an old one: its memory comes fresh from the
    system, with one page fault for every 4 KiB. Other runtimes plan their memory, and converters
    fail on writes into views. No step overwrites what a backward of PyTorch's needs.
    """

    def _gated(self, g: Tensor, w: ExportedWeights, shape: Shape) -> tuple[Tensor, Tensor]:
        row, col = g.mean(3), g.mean(2, keepdim=True)  # (T, n, H), (T, n, 1, W)
        gates = self._directional_gates(torch.cat([row, col.squeeze(2)], 2), w)
        gate_h = gates.narrow(2, 0, shape.height).unsqueeze(3)
        gate_w = gates.narrow(2, shape.height, shape.width).unsqueeze(2)
        return (gate_h * gate_w).mul_(g).flatten(2), self._edges(g, col, shape)

    def _gated_small(
        self, flat: Tensor, w: ExportedWeights, small: SmallMap, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        height, width = shape.height, shape.width
        pooled = torch.matmul(flat, small.pool)  # (T, n, H + W + 9)
        gates = self._directional_gates(pooled.narrow(2, 0, height + width), w)
        gate_h = torch.matmul(gates.narrow(2, 0, height), small.spread_h)
        gate_w = torch.matmul(gates.narrow(2, height, width), small.spread_w)
        return (gate_h * flat).mul_(gate_w), pooled.narrow(2, height + width, 9).flatten(1)

    def _directional_gates(self, means: Tensor, w: ExportedWeights) -> Tensor:
        n = w.mix_bias.shape[0]
        mix = w.mix_weight.view(1, n, n).expand(means.shape[0], n, n)
        return torch.baddbmm(w.mix_bias.unsqueeze(1), mix, means).sigmoid_()

    def _edges(self, g: Tensor, col: Tensor, shape: Shape) -> Tensor:
        first, last = g.narrow(2, 0, 1) / shape.height, g.narrow(2, -1, 1) / shape.height
        over = torch.cat([col, first, last], 2)
        first, last = over.narrow(3, 0, 1) / shape.width, over.narrow(3, -1, 1) / shape.width
        return torch.cat([over.mean(3, keepdim=True), first, last], 3).flatten(1)

    def _convolved(self, g: Tensor, flat: Tensor, w: ExportedWeights, shape: Shape) -> Tensor:
        kernel = w.kernel.view(1, shape.n, 9).mT.expand(g.shape[0], 9, shape.n)
        taps = torch.bmm(kernel, flat).view(-1, 3, 3, shape.height, shape.width)
        # Padded on one side and cut on the other: a slice of W - 1 would exclude W = 2 from
        # exported programs.
        rows = taps.select(2, 1).add_(F.pad(taps.select(2, 2), [1, -1]))  # (T, 3, H, W)
        rows = rows.add_(F.pad(taps.select(2, 0), [-1, 1]))
        local = rows.narrow(1, 1, 1).add_(F.pad(rows.narrow(1, 2, 1), [0, 0, 1, -1]))
        return local.add_(F.pad(rows.narrow(1, 0, 1), [0, 0, -1, 1])).flatten(2)

    def _gate(self, y: Tensor, features: Tensor, local: Tensor, w: ExportedWeights) -> Tensor:
        y = y.sub_(y.mean(2, keepdim=True))
        norm = torch.norm(y, 2, [2])  # a mean of squares would need one more map
        r = (norm * norm).div_(y.shape[2]).add_(self.eps).rsqrt()
        u = torch.addmm(w.vote_bias, features, w.vote_weight).softmax(1)
        weight = (u * r).mul_(w.gn_weight).unsqueeze(1)
        shift = torch.mv(u, w.gn_bias).unsqueeze(1).unsqueeze(2)
        return torch.baddbmm(local, weight, y).add_(shift).sigmoid_()


class Delegate(Plain):
    """Operators that XNNPACK runs, for one size of map: the dialect for ExecuTorch.

    A mobile delegate splits a graph at every operator that it lacks: means along one axis,
    selections, products of small matrices. Here means are average pools, all maps have four
    dimensions and the weights have the shapes that the operators need, so a network is one piece.
    """

    @staticmethod
    def arranged(w: ExportedWeights) -> ExportedWeights:
        """The weights in the shapes that a convolution and linear layers need.

        ``kernel`` becomes (1, n, 3, 3), ``vote_weight`` (n, 9n) and ``gn_bias`` (1, n).
        """
        return w._replace(
            kernel=w.kernel.flip([2, 3]).transpose(0, 1).contiguous(),
            vote_weight=w.vote_weight.t().contiguous(),
            gn_bias=w.gn_bias.unsqueeze(0),
        )

    def forward(
        self,
        x: Tensor,
        w: ExportedWeights,
        groups: int,
        small: SmallMap | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Compute EMA attention for the size of ``x``, with weights from `arranged`.

        ``x`` has the type of the weights; ``small`` and ``size`` are not used.
        """
        batch, channels, height, width = x.shape
        tiles, n = batch * groups, channels // groups
        g = x.reshape(tiles, n, height, width)
        row, col = F.avg_pool2d(g, (1, width)), F.avg_pool2d(g, (height, 1))
        pools = torch.cat([row, col.reshape(tiles, n, width, 1)], 2)
        gates = F.conv2d(pools, w.mix_weight, w.mix_bias).sigmoid()  # (T, n, H + W, 1)
        y = g * gates[:, :, :height] * gates[:, :, height:].reshape(tiles, n, 1, width)
        y = y - F.avg_pool2d(y, (height, width))
        r = (F.avg_pool2d(y * y, (height, width)) + self.eps).rsqrt()
        features = self._edges(g, col, Shape(groups, n, height, width, True))
        u = F.linear(features, w.vote_weight, w.vote_bias).softmax(1)
        weight = (u.reshape(tiles, n, 1, 1) * r).reshape(tiles, 1, n) * w.gn_weight
        norm = torch.bmm(weight, y.reshape(tiles, n, height * width))
        shift = F.linear(u, w.gn_bias)
        logits = F.conv2d(g, w.kernel, padding=1) + norm.reshape(tiles, 1, height, width)
        gate = (logits + shift.reshape(tiles, 1, 1, 1)).sigmoid()
        return (g * gate).reshape(batch, channels, height, width)

    def _edges(self, g: Tensor, col: Tensor, shape: Shape) -> Tensor:
        height, width = shape.height, shape.width
        ends = [g[:, :, :1] * (1 / height), g[:, :, height - 1 :] * (1 / height)]
        over = torch.cat([col, *ends], 2)  # (T, n, 3, W)
        ends = [over[..., :1] * (1 / width), over[..., width - 1 :] * (1 / width)]
        features = torch.cat([F.avg_pool2d(over, (1, width)), *ends], 3)
        return features.reshape(g.shape[0], 9 * shape.n)


DIALECTS = {"plain": Plain, "onnx": Onnx, "pytorch": InPlace, "delegate": Delegate}
"""The dialects by name."""

_PLAIN, _ONNX = Plain(), Onnx()


class ExportedEma(nn.Module):
    """One layer for a file: a dialect, and the arranged weights as buffers.

    Args:
        weights: Arranged weights.
        groups: G.
        dialect: A key of `DIALECTS`.
        small: Matrices for the only size of its maps, or None.
        size: H and W of its maps, for a graph that supports no other.
    """

    def __init__(
        self,
        weights: ExportedWeights,
        groups: int,
        dialect: str = "plain",
        small: SmallMap | None = None,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.groups = groups
        self.size = size
        self.fixed = small is not None
        self.dialect = DIALECTS[dialect]()
        if isinstance(self.dialect, Delegate):
            weights = Delegate.arranged(weights)
        for name, value in weights._asdict().items():
            self.register_buffer(name, value)
        for name in SmallMap._fields:
            matrix = torch.empty(0) if small is None else getattr(small, name)
            self.register_buffer(name, matrix.to(weights.gn_weight))

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (B, C, H, W)."""
        weights = ExportedWeights(
            self.mix_weight,
            self.mix_bias,
            self.kernel,
            self.vote_weight,
            self.vote_bias,
            self.gn_weight,
            self.gn_bias,
        )
        small: SmallMap | None = None
        if self.fixed:
            small = SmallMap(self.pool, self.spread_h, self.spread_w)
        if not torch.jit.is_scripting():
            # PyTorch's ONNX exporter uses Dynamo only after tracing without it has failed. Both
            # fail on convolutions of one channel whose map may be one pixel wide.
            if isinstance(self.dialect, Onnx) and torch.compiler.is_dynamo_compiling():
                return _PLAIN(x, weights, self.groups, small, self.size)
        return self.dialect(x, weights, self.groups, small, self.size)


def closed_form_exported(x: Tensor, weights: EmaWeights, groups: int) -> Tensor:
    """Compute EMA attention of a network that is traced or exported as it is.

    Args:
        x: Feature map, (B, C, H, W), floating point.
        weights: Parameters of one layer.
        groups: G; divides C.

    Returns:
        (B, C, H, W), the dtype and memory format of ``x``.
    """
    dialect = _ONNX if torch.onnx.is_in_onnx_export() else _PLAIN
    return dialect(x, arrange(fold(statistics_type(x, weights))), groups)
