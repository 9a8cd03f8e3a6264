"""The authors' code of EMA attention, which everything here is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_timm.attention import EmaAttn

AUTHORS = "authors' code"
"""Its name in tables."""


class AuthorsEmaAttn(EmaAttn):
    """The paper's module with the operations of the authors' code, all from PyTorch.

    It pools with AdaptiveAvgPool2d, moves groups into the batch, convolves all channels, normalises
    with GroupNorm, and weights maps by batched matrix products. For comparison only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (B, C, H, W)."""
        batch, channels, height, width = x.shape
        n = channels // self.groups
        g = x.reshape(batch * self.groups, n, height, width)
        rows = F.adaptive_avg_pool2d(g, (None, 1))
        cols = F.adaptive_avg_pool2d(g, (1, None)).permute(0, 1, 3, 2)
        gate_h, gate_w = self.conv1x1(torch.cat([rows, cols], 2)).split([height, width], 2)
        x1 = self.gn(g * gate_h.sigmoid() * gate_w.permute(0, 1, 3, 2).sigmoid())
        x2 = self.conv3x3(g)
        v, u = (F.adaptive_avg_pool2d(t, 1).reshape(-1, 1, n).softmax(-1) for t in (x1, x2))
        flat = (t.reshape(-1, n, height * width) for t in (x2, x1))
        logits = sum(a @ t for a, t in zip((v, u), flat, strict=True))
        gate = logits.reshape(-1, 1, height, width).sigmoid()
        return (g * gate).reshape(batch, channels, height, width)
