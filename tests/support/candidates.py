"""Stand-ins for what is measured: candidates that take a set time, and a clock that believes it."""

import torch

from ema_timm.bench.timing import Clock
from ema_timm.ops import ema_attention
from ema_timm.ops.gpu.choice_file import Layer
from ema_timm.tuning.store import Store

ENVIRONMENT = {"device": "a stand-in"}
LAYER = Layer(3, 8, 2, 6, 5, "float32", "contiguous", True)
LAYERS = {LAYER: torch.float32, LAYER._replace(training=False): torch.float32}


class StandInClock(Clock):
    """Counts what candidates say that they take; ``broken`` is a GPU after a fault."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.now = 0.0
        self.broken = False

    def wait(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def time(self, call, repeats):
        started = self.now
        for _ in range(repeats):
            call()
        return self.now - started


class Candidate:
    """Computes as the closed form does, and takes ``ms``; ``act`` is called first."""

    def __init__(self, clock, ms, act=lambda: None, change=lambda out: out):
        self.clock, self.ms, self.act, self.change = clock, ms, act, change
        self.calls = 0

    def __call__(self, x, weights, groups):
        self.calls += 1
        self.clock.now += self.ms
        self.act()
        return self.change(ema_attention(x, weights, groups, impl="closed_form"))


def store():
    return Store(dict(ENVIRONMENT))
