"""The collapsed 3×3 convolution and its transpose as shifted copies: T tiles, H height, W width.

They stand in for library convolutions, which are slow for a single output channel on the CPU.
"""

import torch
from torch import Tensor


def add_convolution(logits: Tensor, g: Tensor, kernel: Tensor) -> None:
    """Add conv(g; k), zero-padded: nine products summed over channels, then shifted adds.

    Args:
        logits: (T, H, W); changed in place.
        g: (T, n, H, W).
        kernel: k, (9, n).
    """
    height, width = logits.shape[1:]
    taps = torch.matmul(kernel, g.flatten(2)).view(-1, 9, height, width)
    for t in range(9):
        dy, dx = t // 3 - 1, t % 3 - 1
        to_h, from_h = _overlap(dy, height)
        to_w, from_w = _overlap(dx, width)
        logits[:, to_h, to_w] += taps[:, t, from_h, from_w]


def shifts(dlogits: Tensor) -> Tensor:
    """``dlogits`` (T, H, W) as each tap of the transposed convolution sees it, (T, 9, HW)."""
    tiles, height, width = dlogits.shape
    out = dlogits.new_zeros((tiles, 9, height, width))
    for t in range(9):
        dy, dx = t // 3 - 1, t % 3 - 1
        to_h, from_h = _overlap(dy, height)
        to_w, from_w = _overlap(dx, width)
        out[:, t, from_h, from_w] = dlogits[:, to_h, to_w]
    return out.flatten(2)


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Where position p reads p + shift without leaving 0..size: slices of p and of p + shift."""
    low, high = max(0, -shift), max(0, size - max(0, shift))
    if low >= high:  # a map one pixel wide: the shift sees padding only
        return slice(0, 0), slice(0, 0)
    return slice(low, high), slice(low + shift, high + shift)
