"""`ema_timm.tune`: choose on this device who computes each EMA attention layer of a model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ema_timm.errors import UserError
from ema_timm.ops import IMPLEMENTATIONS, choices, ema_attention
from ema_timm.tuning.collective import by_first_rank
from ema_timm.tuning.decide import BASE, decide
from ema_timm.tuning.meet import meet
from ema_timm.tuning.parity import Candidate
from ema_timm.tuning.store import Store
from ema_timm.tuning.timing import Clock
from ema_timm.tuning.tuned import Tuned


def tune(
    model: nn.Module,
    example_input: Any,
    training: bool | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Tuned:
    """Choose on this device who computes each EMA attention layer of ``model``, and remember it.

    Each implementation is compared with the float64 definition at each distinct layer's shape
    first, then those that agree are timed. "auto" looks the choice up from then on, in this
    process and in later ones. Where PyTorch's processes of one training are joined, all call this
    and the first one decides for all.

    Args:
        model: Any module that holds layers; left as it was. Under autocast, call this under it.
        example_input: What the model takes: a tensor, a tuple of arguments or a mapping of named
            ones, of the batch size and image size that will be used.
        training: Choose for forward and backward, and for inference at the same shapes; False
            chooses for inference alone, None does as the model's mode says.
        retry: Forget what was chosen for these layers, and which candidates ended a process.
        progress: Show a bar (on a terminal).

    Returns:
        The choices and their reasons; ``print`` shows a table.

    Raises:
        UserError: If the model meets no such layer, or meets them on several devices or one that
            has no float64, or EMA_TIMM_GPU says nothing that it can say.
        VerificationError: If a candidate broke the device for this process.
    """
    asked = choices.wish()
    layers, devices = meet(model, example_input, model.training if training is None else training)
    device = _only(devices)

    def choose() -> Tuned:
        """In the process that decides."""
        store = Store(choices.environment(device))
        outcomes = decide(layers, candidates(), store, Clock(device), retry, progress)
        file = str(store.file) if store.kept else None
        return Tuned(store.environment, asked, file, outcomes, store.notes.chosen)

    tuned = by_first_rank(choose, device)
    choices.remember(device, {**tuned.noted, **{o.layer: o.chosen for o in tuned.outcomes}})
    return tuned


def candidates() -> Mapping[str, Candidate]:
    """The implementations, today's first."""
    names = sorted(IMPLEMENTATIONS, key=lambda name: name != BASE)
    return {name: partial(_by, name) for name in names}


def _by(name: str, *layer: Any) -> torch.Tensor:
    return ema_attention(*layer, impl=name)


def _only(devices: set[torch.device]) -> torch.device:
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(f"the layers must be on one device, got {names}. Tune each part alone.")
    (device,) = devices
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"choices are made on CUDA (and on the CPU, to try), got {device}. There the closed "
            "form runs."
        )
    return device
