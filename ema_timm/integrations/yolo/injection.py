"""Adds EMA attention to a built or trained detector without changing its outputs.

A row is followed by an `EmaAttnRow` with the identity initialisation of
`ema_timm.backbones.warm_start`, whose gate is one half for every input, and a gain of 2: the map
passes unchanged. Doubling the weights of the layer before, as in timm's networks, does not work
here, because blocks end in SiLU. The initial weights are multiples of 2⁻¹⁰, which float16 holds:
YOLO saves checkpoints in half precision.
"""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.backbones.complexity import count_parameters
from ema_timm.backbones.warm_start import neutral_state
from ema_timm.errors import UserError, VerificationError
from ema_timm.integrations.yolo.detector import (
    choose_rows,
    network_of,
    require_ultralytics,
    trace_rows,
)
from ema_timm.integrations.yolo.layer import EmaAttnRow
from ema_timm.integrations.yolo.rows import (
    NAME,
    Insertion,
    insert_rows,
    listed_from,
    rows_of,
    sources,
)
from ema_timm.ops.reference import relative_difference

# Multiples of 2⁻¹⁰ up to 2 are exact in float16, and so are their sums in float32.
HALF_GRID = 2.0**10
NEUTRAL_GAIN = 2.0
INJECTION_TOLERANCE = 1e-5  # of the largest value; 1 / n is rounded unless n is a power of two


@dataclass(frozen=True)
class Injection:
    """The result of `injected`.

    Attributes:
        yolo: The detector.
        layers: For each layer its row, the name of the block before, C and G.
        carried: Number of the detector's tensors that are unchanged.
        tensors: Number of its tensors.
        rebuilt: Number of the unchanged tensors that ``train()``, which builds the network again
            from the YAML, loads.
        parameters: Number of parameters, before and after.
        difference: Largest difference of the last row's inputs, before and after, relative to the
            largest value; None if they need not stay the same.
    """

    yolo: Any
    layers: tuple[tuple[int, str, int, int], ...]
    carried: int
    tensors: int
    rebuilt: int
    parameters: tuple[int, int]
    difference: float | None

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"row {row}: EMA attention after {block}, {channels} channels in {groups} groups"
            for row, block, channels, groups in self.layers
        ]
        lines.append(
            f"{self.carried} of {self.tensors} tensors carried over, {self.rebuilt} of them "
            "known to train() by name and shape"
        )
        lines.append(f"{before:,} -> {after:,} parameters")
        if self.difference is not None:
            lines.append(f"the maps that the last row is given differ by {self.difference:.1e}")
        return "\n".join(lines)


def inject(
    yolo: Any,
    after: str | Iterable[int] = "head",
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
) -> Any:
    """Add EMA attention to a detector. Its outputs stay the same until you train it.

    Args:
        yolo: ``YOLO("yolo11n.pt")``, or any YOLO or RTDETR object of ultralytics; changed in place.
            For training on several GPUs save it and train the file: in older versions (such as
            8.2) worker processes read a file.
        after: "head" (after the blocks that feed the head), "backbone", "neck", "all", or numbers
            of rows.
        groups: Maximum number of groups of each layer.
        preserve: Initialise the layers so that the outputs stay the same. False is the paper's
            layer with random weights.

    Returns:
        ``yolo``. A report is logged as ultralytics logs; `injected` returns it.

    Raises:
        TypeError: If ``yolo`` holds no PyTorch network.
        UserError: If ultralytics is missing or too old, a row cannot take EMA attention, or the
            references of the network cannot be moved safely.
        VerificationError: If the outputs differ; ``yolo`` is unchanged.
    """
    done = injected(yolo, after, groups, preserve)
    logging.getLogger("ultralytics").info("%s", done)
    return done.yolo


def injected(
    yolo: Any,
    after: str | Iterable[int] = "head",
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
) -> Injection:
    """`inject`, with a report; the same arguments and errors."""
    require_ultralytics()
    net = network_of(yolo)
    _require_trainable(net)
    maps, shapes = trace_rows(net)
    chosen = choose_rows(net, after, shapes)
    insertion = insert_rows(net.yaml, chosen, [-1, 1, NAME, _arguments(groups, preserve)])
    layers = {row: _layer(shapes[row][1], groups, preserve) for row in chosen}
    new = _assembled(net, insertion, layers)
    difference = largest_difference(maps, trace_rows(new)[0]) if preserve else None
    if difference is not None and not difference <= INJECTION_TOLERANCE:
        raise VerificationError(
            f"with EMA attention after rows {chosen} the inputs of the last row differ by "
            f"{difference:.1e}, so nothing was changed. Choose other rows."
        )
    carried = {_moved_name(name, insertion.moved) for name in net.state_dict()}
    rebuilt = _rebuilt(new, carried)
    _adopt(yolo, new)
    return Injection(
        yolo=yolo,
        layers=tuple(_described(new, net, insertion, row) for row in chosen),
        carried=len(carried & new.state_dict().keys()),
        tensors=len(carried),
        rebuilt=rebuilt,
        parameters=(count_parameters(net), count_parameters(new)),
        difference=difference,
    )


def _arguments(groups: int, preserve: bool) -> list:
    """Arguments of the row; a rebuilt layer needs the gain."""
    return [{"groups": groups, **({"gain": NEUTRAL_GAIN} if preserve else {})}]


def _require_trainable(net: nn.Module) -> None:
    if net.is_fused():
        raise UserError(
            "this network's norms are fused into its convolutions, so training would start "
            "without them. Load the checkpoint again, before predict() or fuse()."
        )
    import ultralytics.nn.tasks as tasks

    if vars(tasks).get(NAME) is not EmaAttnRow:
        raise UserError(
            f"rows named {NAME} build {vars(tasks).get(NAME)!r} in ultralytics.nn.tasks, not "
            "ema-timm's layer. Import ema_timm, and give a class of your own another name."
        )


def _assembled(net: nn.Module, insertion: Insertion, added: dict[int, EmaAttnRow]) -> nn.Module:
    """The network's own modules with the layers between them; every attribute stays."""
    new = copy.deepcopy(net)
    froms = [row[0] for row in rows_of(insertion.config)]
    layers = []
    for index, module in enumerate(new.model):
        layers.append(module)
        if index in added:
            like = next(net.parameters())
            layers.append(added[index].to(like).train(net.training))
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


def _layer(channels: int, groups: int, preserve: bool) -> EmaAttnRow:
    layer = EmaAttnRow(channels, groups=groups, gain=NEUTRAL_GAIN if preserve else 1)
    if preserve:
        layer.load_state_dict(neutral_state(layer, HALF_GRID))
        layer.half().float()  # rounded now, as a checkpoint rounds
    # The builders set these on each layer for their summaries.
    layer.type = f"{EmaAttnRow.__module__}.{EmaAttnRow.__qualname__}"
    layer.np = count_parameters(layer)
    return layer


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest `relative_difference` of two lists of maps, pair by pair."""
    return max(relative_difference(a, b) for a, b in zip(after, before, strict=True))


def _moved_name(name: str, moved: tuple[int, ...]) -> str:
    """``model.<row>.rest`` with the row's new index."""
    prefix, row, rest = name.split(".", 2)
    return f"{prefix}.{moved[int(row)]}.{rest}"


def _rebuilt(new: nn.Module, carried: set[str]) -> int:
    """Number of carried tensors that fit the network that ``train()`` builds from the YAML."""
    config = copy.deepcopy(new.yaml)
    channels = config.get("channels", config.get("ch", 3))
    with torch.random.fork_rng():
        built = type(new)(config, ch=channels, nc=config.get("nc"), verbose=False)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return sum(
        shapes.get(name) == tensor.shape
        for name, tensor in new.state_dict().items()
        if name in carried
    )


def _adopt(yolo: Any, new: nn.Module) -> None:
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


def _described(
    new: nn.Module, net: nn.Module, insertion: Insertion, row: int
) -> tuple[int, str, int, int]:
    number = insertion.moved[row] + 1
    layer = new.model[number]
    block = f"{rows_of(net.yaml)[row][2]} (row {row})"
    return number, block, layer.channels, layer.groups
