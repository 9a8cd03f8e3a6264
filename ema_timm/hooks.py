"""The forward hooks with which `inject` runs an EMA layer after a module of any network.

The layer is the module's child ``ema``, so the names of existing parameters stay. Its hook applies
it to what the module returns. A layer with the identity initialisation halves its input, and the
hook doubles the result. Both are exact in binary floating point.

Pickles of whole networks name these functions: neither they nor this module may be renamed. The
module needs only torch, so that a network can be unpickled without an import of timm.
"""

import torch
from torch import Tensor, nn

CHILD = "ema"
"""Name of the layer in the module."""

_KEY = -1
"""Key of the hook. PyTorch counts its own keys from 0 in each process: a hook that is registered
on an unpickled network could otherwise replace this one without a message."""


# TorchScript compiles hooks of exactly these argument names and types.
def gate_output(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Apply the layer to ``output``, (B, C, H, W)."""
    return self.ema(output)


def gate_output_doubled(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Apply the layer to ``output``, (B, C, H, W), with gain 2."""
    return self.ema(output) * 2.0


def gate_output_nhwc(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Apply the layer to ``output``, (B, H, W, C)."""
    return self.ema(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def gate_output_nhwc_doubled(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Apply the layer to ``output``, (B, H, W, C), with gain 2."""
    return self.ema(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * 2.0


HOOKS = {
    ("NCHW", 1): gate_output,
    ("NCHW", 2): gate_output_doubled,
    ("NHWC", 1): gate_output_nhwc,
    ("NHWC", 2): gate_output_nhwc_doubled,
}
"""The hook by the layout of the map and the gain."""


def attach(module: nn.Module, layer: nn.Module, layout: str, gain: int) -> None:
    """Run ``layer`` after each forward of ``module``."""
    guard_hooks()
    module.add_module(CHILD, layer)
    module._forward_hooks[_KEY] = HOOKS[layout, gain]


def guard_hooks() -> None:
    """Make ``torch.compile`` see which modules have hooks, in this process.

    By default it does not look: it runs the code that it compiled for a network without the layers
    also for the same network with them, so that they are skipped without a message.
    """
    config = torch._dynamo.config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # what is compiled already does not look


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    del module._forward_hooks[_KEY], module._modules[CHILD]


def attached(module: nn.Module) -> tuple[str, int] | None:
    """Layout and gain of the layer that `attach` added, or None."""
    hook = module._forward_hooks.get(_KEY)
    return next((key for key, known in HOOKS.items() if known is hook), None)
