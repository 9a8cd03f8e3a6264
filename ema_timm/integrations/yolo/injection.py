"""Adds EMA attention to a built or trained detector without changing its outputs.

The layers go after rows, or inside blocks (`ema_timm.integrations.yolo.inside`). Each starts with
the identity initialisation of `ema_timm.backbones.warm_start`, whose gate is one half for every
input, and a gain of 2: the map passes unchanged. Doubling the weights of the layer before, as in
timm's networks, does not work here, because blocks end in SiLU. The initial weights of rows are
multiples of 2⁻¹⁰, which float16 holds: YOLO saves checkpoints in half precision.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import DEFAULT_GROUPS
from ema_timm.backbones.complexity import count_parameters
from ema_timm.backbones.warm_start import neutral_state
from ema_timm.errors import UserError, VerificationError
from ema_timm.integrations.yolo.assembly import adopt, assembled
from ema_timm.integrations.yolo.detector import (
    choose_rows,
    ema_layers,
    network_of,
    require_ultralytics,
    trace_rows,
)
from ema_timm.integrations.yolo.inside import INSIDE, EmaAttnInside, fill_blocks
from ema_timm.integrations.yolo.layer import ROWS, EmaAttnRow
from ema_timm.integrations.yolo.rows import NAME, Insertion, insert_rows, rows_of
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
        layers: For each layer its row, what it follows, C and G.
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
    after: str | Iterable[int] | None = None,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    inside: str | Sequence[str] | None = None,
) -> Any:
    """Add EMA attention to a detector. Its outputs stay the same until you train it.

    Args:
        yolo: ``YOLO("yolo11n.pt")``, or any YOLO or RTDETR object of ultralytics; changed in place.
            For training on several GPUs save it and train the file: in older versions (such as
            8.2) worker processes read a file.
        after: "head" (after the blocks that feed the head; the default), "backbone", "neck", "all",
            or numbers of rows.
        groups: Maximum number of groups of each layer.
        preserve: Initialise the layers so that the outputs stay the same. False is the paper's
            layer with random weights.
        inside: Names of classes, such as "C3k2", instead of ``after``: a layer goes after each
            direct element of ``m`` of every block of these classes.

    Returns:
        ``yolo``. A report is logged as ultralytics logs; `injected` returns it.

    Raises:
        TypeError: If ``yolo`` holds no PyTorch network.
        UserError: If ultralytics is missing or too old, a row or a block cannot take EMA attention,
            or the references of the network cannot be moved safely.
        VerificationError: If the outputs differ; ``yolo`` is unchanged.
    """
    done = injected(yolo, after, groups, preserve, inside)
    logging.getLogger("ultralytics").info("%s", done)
    return done.yolo


def injected(
    yolo: Any,
    after: str | Iterable[int] | None = None,
    groups: int = DEFAULT_GROUPS,
    preserve: bool = True,
    inside: str | Sequence[str] | None = None,
) -> Injection:
    """`inject`, with a report; the same arguments and errors."""
    if after is not None and inside is not None:
        raise UserError("after and inside exclude each other. Inject twice to have both.")
    require_ultralytics()
    net = network_of(yolo)
    _require_trainable(net)
    maps, shapes = trace_rows(net)
    if inside is None:
        after = "head" if after is None else after
        insertion, new = _after_rows(net, after, shapes, groups, preserve)
    else:
        classes = [inside] if isinstance(inside, str) else list(inside)
        insertion, new = _inside_blocks(net, classes, groups, preserve)
    difference = largest_difference(maps, trace_rows(new)[0]) if preserve else None
    if difference is not None and not difference <= INJECTION_TOLERANCE:
        raise VerificationError(
            f"with EMA attention the inputs of the last row differ by {difference:.1e}, so nothing "
            "was changed. Choose other rows."
        )
    carried = {_moved_name(name, insertion.moved) for name in net.state_dict()}
    rebuilt = _rebuilt(new, carried)
    adopt(yolo, new)
    return Injection(
        yolo=yolo,
        layers=tuple(_described(new, net, insertion, carried)),
        carried=len(carried & new.state_dict().keys()),
        tensors=len(carried),
        rebuilt=rebuilt,
        parameters=(count_parameters(net), count_parameters(new)),
        difference=difference,
    )


def _after_rows(
    net: nn.Module, after: str | Iterable[int], shapes: list, groups: int, preserve: bool
) -> tuple[Insertion, nn.Module]:
    """A copy of the network with layers after rows."""
    chosen = choose_rows(net, after, shapes)
    insertion = insert_rows(net.yaml, chosen, [-1, 1, NAME, [_arguments(groups, preserve)]])
    layers = {row: _layer(shapes[row][1], groups, preserve) for row in chosen}
    return insertion, assembled(net, insertion, layers)


def _inside_blocks(
    net: nn.Module, classes: list[str], groups: int, preserve: bool
) -> tuple[Insertion, nn.Module]:
    """A copy of the network with layers inside blocks, and the row that says so before its last."""
    before_last = len(net.model) - 2
    arguments = [*classes, _arguments(groups, preserve)]
    try:
        row = EmaAttnInside(*arguments)
        insertion = insert_rows(net.yaml, [before_last], [-1, 1, INSIDE, arguments])
        new = assembled(net, insertion, {before_last: row})
        fill_blocks(new.model, row.classes, row.groups, row.gain)
    except ValueError as error:
        raise UserError(str(error)) from error
    return insertion, new


def _arguments(groups: int, preserve: bool) -> dict:
    """Keyword arguments of the row; a rebuilt layer needs the gain."""
    return {"groups": groups, **({"gain": NEUTRAL_GAIN} if preserve else {})}


def _require_trainable(net: nn.Module) -> None:
    if net.is_fused():
        raise UserError(
            "this network's norms are fused into its convolutions, so training would start "
            "without them. Load the checkpoint again, before predict() or fuse()."
        )
    import ultralytics.nn.tasks as tasks

    for name, ours in ROWS.items():
        if vars(tasks).get(name) is not ours:
            raise UserError(
                f"rows named {name} build {vars(tasks).get(name)!r} in ultralytics.nn.tasks, not "
                "ema-timm's layer. Import ema_timm, and give a class of your own another name."
            )


def _layer(channels: int, groups: int, preserve: bool) -> EmaAttnRow:
    layer = EmaAttnRow(channels, groups=groups, gain=NEUTRAL_GAIN if preserve else 1)
    if preserve:
        layer.load_state_dict(neutral_state(layer, HALF_GRID))
        layer.half().float()  # rounded now, as a checkpoint rounds
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


def _described(
    new: nn.Module, net: nn.Module, insertion: Insertion, carried: set[str]
) -> Iterator[tuple[int, str, int, int]]:
    """The layers that the network did not have before."""
    rows = rows_of(net.yaml)
    for number, name, layer in ema_layers(new):
        if f"model.{number}.{name}gn.weight" in carried:
            continue
        if name:
            block = f"{name.removesuffix('.ema.')} of {rows_of(new.yaml)[number][2]}"
        else:
            row = insertion.moved.index(number - 1)
            block = f"{rows[row][2]} (row {row})"
        yield number, block, layer.channels, layer.groups
