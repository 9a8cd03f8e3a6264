"""Puts new modules between the rows of a network, and the network into its detector."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from ema_timm.backbones.complexity import count_parameters
from ema_timm.integrations.yolo.rows import Insertion, listed_from, rows_of, sources


def assembled(net: nn.Module, insertion: Insertion, added: dict[int, nn.Module]) -> nn.Module:
    """A copy of a network with modules added after rows; every other attribute stays.

    Args:
        net: The network; not changed.
        insertion: Its model YAML with rows inserted.
        added: The modules of these rows, by the old number of the row before.
    """
    new = copy.deepcopy(net)
    froms = [row[0] for row in rows_of(insertion.config)]
    layers = []
    for index, module in enumerate(new.model):
        layers.append(module)
        if index in added:
            like = next(net.parameters())
            row = added[index].to(like).train(net.training)
            # The builders set these on each row for their summaries.
            row.type = f"{type(row).__module__}.{type(row).__qualname__}"
            row.np = count_parameters(row)
            layers.append(row)
    for index, (module, source) in enumerate(zip(layers, froms, strict=True)):
        module.i, module.f = index, source
    new.model = nn.Sequential(*layers)
    new.save = sorted(
        {source for i, row in enumerate(rows_of(insertion.config)) for source in _kept(i, row)}
    )
    new.yaml = insertion.config
    return new


def _kept(index: int, row: list) -> list[int]:
    """Rows whose output row ``index`` needs later: all that it reads except the one before it."""
    return [s for f, s in zip(listed_from(row), sources(index, row), strict=True) if f != -1]


def adopt(yolo: Any, new: nn.Module) -> None:
    """Put the network into the wrapper, so that ``train()``, ``save()`` and ``val()`` use it."""
    kept = yolo.ckpt.get("train_args") if isinstance(yolo.ckpt, dict) else None
    yolo.model = new
    # train() uses the weights in memory only if a checkpoint is set. This one has no epoch or
    # optimizer, so that no earlier run is resumed.
    yolo.ckpt = {"model": new, **({"train_args": kept} if kept else {})}
    yolo.ckpt_path = None
    # In older versions the workers of a multi-GPU training load this file: they should fail rather
    # than train the detector without the layers.
    yolo.overrides["model"] = f"{Path(str(yolo.overrides.get('model', 'yolo'))).stem}-ema.pt"
    yolo.predictor = None
