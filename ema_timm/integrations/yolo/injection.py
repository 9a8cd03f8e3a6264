"""EMA attention into a detector that is built or trained, without changing what it computes.

Behind a row goes `EmaAttnRow` with the neutral start of `ema_timm.backbones.warm_start`, whose gate
is one half for every input, and a gain of 2: the map passes unchanged. Doubling a neighbour's
weights, as in timm's networks, will not do here: blocks end in SiLU. The start stands on a grid
that float16 holds, because YOLO saves checkpoints in half precision.
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
from ema_timm.backbones.warm_start import neutral_state
from ema_timm.errors import UserError, VerificationError
from ema_timm.integrations.yolo.detector import (
    choose_rows,
    network_of,
    require_ultralytics,
    trace_rows,
)
from ema_timm.integrations.yolo.layer import EmaAttnRow
from ema_timm.integrations.yolo.rows import NAME, Insertion, insert_rows, rows_of, sources
from ema_timm.ops.reference import relative_difference

# Multiples of 2⁻¹⁰ up to 2 are exact in float16, and so are their sums in float32.
HALF_GRID = 2.0**10
NEUTRAL_GAIN = 2.0
INJECTION_TOLERANCE = 1e-5  # of the largest value; 1 / n is rounded where n is no power of two


@dataclass(frozen=True)
class Injection:
    """What was done to a detector.

    Attributes:
        yolo: The detector.
        layers: For each layer its row, the name of the block before, C and G.
        carried: How many tensors of the detector came along unchanged.
        tensors: How many it had.
        rebuilt: How many of them ``train()``, which builds anew from the YAML, will take over.
        parameters: Numbers in all parameters, before and after.
        difference: Largest difference between the maps that the last row is given, before and
            after, relative to the largest value; None where it was not to stay the same.
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
            f"row {row}: EMA attention behind {block}, {channels} channels in {groups} groups"
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
    """Put EMA attention into a detector; it computes what it computed, and trains from there.

    Args:
        yolo: ``YOLO("yolo11n.pt")``, or any YOLO or RTDETR object of ultralytics; changed in place.
            For training on several GPUs save it and train the file: in older versions (8.2, say)
            worker processes read a file.
        after: "head" (behind the blocks that feed the head), "backbone", "neck", "all", or numbers
            of rows.
        groups: Upper bound for the number of groups of each layer.
        preserve: Start from weights with which the detector computes what it computed before.
            False is the paper's layer from its random start.

    Returns:
        ``yolo``. What was done is logged as ultralytics logs; `injected` returns it.

    Raises:
        TypeError: If ``yolo`` holds no PyTorch network.
        UserError: If ultralytics is missing or too old, a row cannot take EMA attention, or the
            network is one whose references cannot be moved safely.
        VerificationError: If the result does not compute the same; ``yolo`` is as before.
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
            f"with EMA attention behind rows {chosen} the last row is given maps that differ by "
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
        parameters=(_count(net), _count(new)),
        difference=difference,
    )


def _arguments(groups: int, preserve: bool) -> list:
    """What the YAML says: c2 fits every scale, and a rebuilt layer needs the gain."""
    return ["c2", groups, int(NEUTRAL_GAIN)] if preserve else ["c2", groups]


def _require_trainable(net: nn.Module) -> None:
    if net.is_fused():
        raise UserError(
            "this network's norms are fused into its convolutions, so training would start "
            "without them. Load the checkpoint anew, before predict() or fuse()."
        )
    import ultralytics.nn.tasks as tasks

    if vars(tasks).get(NAME) is not EmaAttnRow:
        raise UserError(
            f"rows named {NAME} build {vars(tasks).get(NAME)!r} in ultralytics.nn.tasks, not "
            "ema-timm's layer. Import ema_timm, and give a class of your own another name."
        )


def _assembled(net: nn.Module, insertion: Insertion, added: dict[int, EmaAttnRow]) -> nn.Module:
    """The network's own modules with layers between them; every attribute stays."""
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
    """Rows whose output must be kept for row ``index``: all it reads but the one just before."""
    froms = [row[0]] if isinstance(row[0], int) else row[0]
    return [s for f, s in zip(froms, sources(index, row), strict=True) if f != -1]


def _layer(channels: int, groups: int, preserve: bool) -> EmaAttnRow:
    layer = EmaAttnRow(channels, groups, NEUTRAL_GAIN if preserve else 1)
    if preserve:
        layer.load_state_dict(neutral_state(layer, HALF_GRID))
        layer.half().float()  # what a checkpoint rounds is rounded now
    # What the builders note on each layer for their summaries.
    layer.type = f"{EmaAttnRow.__module__}.{EmaAttnRow.__qualname__}"
    layer.np = _count(layer)
    return layer


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest `relative_difference` of two lists of maps, pair by pair."""
    return max(relative_difference(a, b) for a, b in zip(after, before, strict=True))


def _moved_name(name: str, moved: tuple[int, ...]) -> str:
    """``model.<row>.rest`` with the row's new index."""
    prefix, row, rest = name.split(".", 2)
    return f"{prefix}.{moved[int(row)]}.{rest}"


def _rebuilt(new: nn.Module, carried: set[str]) -> int:
    """How many carried tensors fit the network that ``train()`` will build from the YAML."""
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
    """Put the network into the wrapper so that ``train()``, ``save()`` and ``val()`` take it."""
    kept = yolo.ckpt.get("train_args") if isinstance(yolo.ckpt, dict) else None
    yolo.model = new
    # train() takes weights from memory only while a checkpoint is set; this one has no epoch or
    # optimizer, so that nothing resumes the run of the detector before.
    yolo.ckpt = {"model": new, **({"train_args": kept} if kept else {})}
    yolo.ckpt_path = None
    # In older versions the workers of a training on several GPUs load this file: better that they
    # miss it than that they train the detector before.
    yolo.overrides["model"] = f"{Path(str(yolo.overrides.get('model', 'yolo'))).stem}-ema.pt"
    yolo.predictor = None


def _described(
    new: nn.Module, net: nn.Module, insertion: Insertion, row: int
) -> tuple[int, str, int, int]:
    number = insertion.moved[row] + 1
    layer = new.model[number]
    block = f"{rows_of(net.yaml)[row][2]} (row {row})"
    return number, block, layer.channels, layer.groups


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
