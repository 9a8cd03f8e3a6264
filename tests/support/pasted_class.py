"""An EMA class as people paste it: the authors' names and arguments, written for these tests."""

import torch
from torch import nn


class EMA(nn.Module):
    def __init__(self, channels, c2=None, factor=32):
        super().__init__()
        self.groups = factor
        n = channels // self.groups
        self.softmax = nn.Softmax(-1)
        self.agp = nn.AdaptiveAvgPool2d((1, 1))
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.gn = nn.GroupNorm(n, n)
        self.conv1x1 = nn.Conv2d(n, n, 1)
        self.conv3x3 = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):
        batch, _, height, width = x.shape
        g = x.reshape(batch * self.groups, -1, height, width)
        both = torch.cat([self.pool_h(g), self.pool_w(g).permute(0, 1, 3, 2)], 2)
        h, w = self.conv1x1(both).split([height, width], 2)
        first = self.gn(g * h.sigmoid() * w.permute(0, 1, 3, 2).sigmoid())
        second = self.conv3x3(g)
        maps = 0
        for means, values in ((first, second), (second, first)):
            weights = self.softmax(self.agp(means).flatten(1).unsqueeze(1))
            maps = maps + weights @ values.flatten(2)
        return (g * maps.reshape(-1, 1, height, width).sigmoid()).reshape(x.shape)
