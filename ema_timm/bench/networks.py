"""Whole networks to measure, and their calls: an inference, a training step."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn, set_implementation


def build(
    name: str,
    arguments: dict,
    device: torch.device,
    channels_last: bool = False,
    impl: str = "auto",
) -> nn.Module:
    """A timm network with weights under which attention has work to do.

    Args:
        name: timm name.
        arguments: Of ``timm.create_model``.
        device: Where to.
        channels_last: Memory format.
        impl: Who computes the EMA layers.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).to(device)
    with torch.no_grad():  # timm zeroes the last norms, and attention of a zero map is no work
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if impl != "auto" and any(isinstance(module, EmaAttn) for module in model.modules()):
        set_implementation(model, impl)
    return model


def inference(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call that infers ``images``; ``amp``: in bfloat16 mixed precision."""

    def call() -> object:
        """One batch, without gradients."""
        model.eval()
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, amp):
            return model(images)

    return call


def training_step(model: nn.Module, images: Tensor, amp: bool = False) -> Callable[[], object]:
    """A call that trains on ``images``; ``amp``: in bfloat16 mixed precision."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    targets = torch.arange(len(images), device=images.device)

    def call() -> None:
        """Forward, loss, backward and a step of the optimiser."""
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16, amp):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call
