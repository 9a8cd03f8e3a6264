"""The backbone kept as it is for the first epochs, while head and EMA layers learn."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_timm.training.start import head_and_attention


class Backbone:
    """All of a network that its start has given: neither head nor EMA layers.

    timm's `freeze` and `unfreeze` put new batch-norm layers into the network, whose parameters
    the optimiser would not know, and let everything learn in the end, also what never does.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        own = head_and_attention(model)
        self.parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in own
        ]
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """Keep it from learning, or let it."""
        self.frozen = frozen
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)

    def train(self) -> None:
        """After the network was put into training mode: keep the statistics of a frozen one."""
        if self.frozen:
            for norm in self.norms:
                norm.eval()
