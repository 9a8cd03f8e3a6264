"""A detector of ultralytics: supported versions, the outputs of its rows, the places for layers."""

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.errors import UserError, require_packages
from ema_timm.hooks import CHILD
from ema_timm.integrations.yolo.rows import PLACES, listed_from, rows_of, sources

OLDEST = (8, 2)
NEXT = (9,)

# Large enough for RT-DETR, whose decoder picks 300 places of an image; a multiple of every stride.
_PIXELS = 256
_BLOCK = 3  # convolutions; other rows have one, a pooling pyramid or a ghost convolution two


def require_ultralytics() -> None:
    """Raise UserError if ultralytics is missing or of an untested version."""
    rule = f"ultralytics >= {OLDEST[0]}.{OLDEST[1]}, < {NEXT[0]}"
    require_packages(["ultralytics"], "yolo")
    found = version("ultralytics")
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= numbers < NEXT:
        raise UserError(
            f"this needs {rule}, and {found} is installed: pip install 'ema-timm[yolo]'."
        )


def network_of(yolo: Any) -> nn.Module:
    """The network inside a ``YOLO`` or ``RTDETR`` object, made of the rows of its own YAML.

    Raises:
        TypeError: If there is none, as in an exported model.
        UserError: If its modules are not those rows, because references could not be moved.
    """
    net = getattr(yolo, "model", None)
    if not isinstance(net, nn.Module) or not isinstance(getattr(net, "yaml", None), dict):
        raise TypeError(
            "EMA attention goes into a YOLO or RTDETR object that holds a PyTorch network, got "
            f"{type(yolo).__name__} with {type(net).__name__}. Give a .pt checkpoint or a YAML."
        )
    rows = rows_of(net.yaml)
    layers = list(net.model)
    found = [(layer.i, listed_from([layer.f])) for layer in layers]
    if found != [(i, listed_from(row)) for i, row in enumerate(rows)]:
        raise UserError(
            f"the {len(layers)} layers of this network are not the {len(rows)} rows of its YAML, "
            "so references cannot be moved safely. Start from a network built by its YAML."
        )
    return net


@torch.no_grad()
def trace_rows(net: nn.Module) -> tuple[list[Tensor], list[tuple[int, ...] | None]]:
    """Run a fixed image through a network.

    Args:
        net: The network; its modes are restored.

    Returns:
        The inputs of its last row, and the shape of each row's output; None for rows whose output
        is not one tensor.
    """
    given: list[Tensor] = []
    shapes: list[tuple[int, ...] | None] = []

    def keep_input(module, args):
        given.extend(args[0] if isinstance(args[0], list | tuple) else args[:1])

    def keep_shape(module, args, output):
        shapes.append(tuple(output.shape) if isinstance(output, Tensor) else None)

    like = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    channels = net.yaml.get("channels", net.yaml.get("ch", 3))
    image = torch.rand(1, channels, _PIXELS, _PIXELS, generator=generator).to(like)
    hooks = [layer.register_forward_hook(keep_shape) for layer in net.model]
    hooks.append(net.model[-1].register_forward_pre_hook(keep_input))
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return given, shapes


def ema_layers(net: nn.Module) -> Iterator[tuple[int, str, EmaAttn]]:
    """The EMA layers of a network: number of the row, name in the row, and layer.

    The name ends in a dot, and is empty if the row is the layer: "1." in a row that is repeated,
    "m.0.ema." inside a block.
    """
    for number, row in enumerate(net.model):
        for name, module in row.named_modules():
            if isinstance(module, EmaAttn):
                yield number, f"{name}." if name else "", module


def all_but_attention(yolo: Any) -> list[int | str]:
    """What to freeze so that ``train`` changes only the EMA layers.

    ``yolo.train(data="coco8.yaml", freeze=all_but_attention(yolo))``. Frozen norms keep their
    statistics.

    Args:
        yolo: A YOLO or RTDETR object with EMA attention.

    Returns:
        Numbers of rows without EMA attention, and names of the parts of the other rows.

    Raises:
        UserError: If it has no EMA attention, or a part of it cannot be frozen by its name.
    """
    net = network_of(yolo)
    if not any(isinstance(module, EmaAttn) for module in net.modules()):
        raise UserError("this detector has no EMA attention. Add it with: ema-timm yolo.")
    frozen: list[int | str] = []
    for number, row in enumerate(net.model):
        frozen += _frozen(str(number), row)
    return frozen


def _frozen(name: str, module: nn.Module) -> list[int | str]:
    if isinstance(module, EmaAttn):
        return []
    if not any(isinstance(each, EmaAttn) for each in module.modules()):
        has_weights = any(True for _ in module.parameters())
        return ([int(name)] if name.isdecimal() else [name]) if has_weights else []
    own = [key for key, _ in module.named_parameters(recurse=False)]
    if own:
        raise UserError(
            f"{name}.{own[0]} is beside EMA attention in {type(module).__name__}, and ultralytics "
            "freezes only whole modules. Set its requires_grad in a callback on_train_start."
        )
    return [
        part for key, child in module.named_children() for part in _frozen(f"{name}.{key}", child)
    ]


def choose_rows(net: nn.Module, after: str | Iterable[int], shapes: list) -> list[int]:
    """The rows after which EMA attention goes.

    Args:
        net: The network.
        after: "head": the rows that feed the last one. "backbone", "neck", "all": the blocks of
            that part. A block is a row of three convolutions or more, except the first row, the
            stem; the neck is between backbone and last row. Or numbers of rows.
        shapes: Shape of each row's output, from `trace_rows`.

    Raises:
        UserError: If there is no such row, its output is not a map, or it has EMA attention.
    """
    rows, split = rows_of(net.yaml), len(net.yaml["backbone"])
    last = len(rows) - 1
    if isinstance(after, str):
        if after not in PLACES:
            raise UserError(
                f"after must be one of {', '.join(PLACES)}, or numbers of rows, got {after!r}."
            )
        chosen = _named(net, after, shapes, rows, split)
    else:
        chosen = sorted({int(number) for number in after})
    if not chosen:
        raise UserError(
            f"this network has no block in its {after}. Give another place ({', '.join(PLACES)}) "
            "or numbers of rows."
        )
    taken = _ema_rows(net)
    for number in chosen:
        if not 0 <= number < last:
            raise UserError(f"EMA attention goes after rows 0 to {last - 1}, got {number}.")
        if shapes[number] is None or len(shapes[number]) != 4:
            raise UserError(
                f"row {number} ({rows[number][2]}) does not give one map (B, C, H, W), so EMA "
                "attention cannot follow it. Choose other rows."
            )
        if taken & {number, number + 1}:
            raise UserError(
                f"row {number} has EMA attention already. Start from the detector without."
            )
    return chosen


def _ema_rows(net: nn.Module) -> set[int]:
    """Numbers of the rows that are EMA layers, once or repeated."""
    return {number for number, name, _ in ema_layers(net) if not name.endswith(f"{CHILD}.")}


def _named(net: nn.Module, after: str, shapes: list, rows: list, split: int) -> list[int]:
    last = len(rows) - 1
    if after == "head":
        return sorted(set(sources(last, rows[last])))
    parts = {"backbone": range(1, split), "neck": range(split, last), "all": range(1, last)}
    return [
        index
        for index in parts[after]
        if shapes[index] is not None
        and len(shapes[index]) == 4
        and index not in _ema_rows(net)
        and sum(isinstance(m, nn.Conv2d) for m in net.model[index].modules()) >= _BLOCK
    ]
