"""``ema-timm bench bytes``: the bytes that a training step moves on a GPU, counted without a GPU.

Experimental: these counts have not been compared with times on a GPU yet.
"""

from functools import cache
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ema_timm.attention import EmaAttn, largest_group_count
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.counter import Counter, backward, cuda_autocast
from ema_timm.bench.layer import SHAPES
from ema_timm.bench.model import BASELINES
from ema_timm.bench.timing import saved_bytes
from ema_timm.environment import machine
from ema_timm.ops.gpu.choice_file import LAYOUTS

DTYPES = ("float32", "bfloat16", "float16")
VARIANTS = {AUTHORS: AuthorsEmaAttn, "auto": EmaAttn}
"""Layers by the name in the table."""


class Setting(NamedTuple):
    """One way to train.

    Attributes:
        batch: Images in a batch.
        dtype: Of the map; half precision means autocast with float32 parameters.
        layout: Memory format, a key of `LAYOUTS`.
    """

    batch: int
    dtype: str
    layout: str


def bench_bytes(
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    networks: tuple[str, ...] = tuple(f"{name}_ema" for name in BASELINES),
    batch_size: int = 256,
    dtypes: tuple[str, ...] = DTYPES,
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    img_size: int = 224,
) -> dict:
    """Count a training step of every variant at every shape, and of all layers of networks.

    Args:
        shapes: (C, H, W) by name.
        networks: timm names; the counts of all EMA layers of one are added up.
        batch_size: B.
        dtypes: Types of the map.
        layouts: Memory formats.
        img_size: Height and width of the networks' images in pixels.

    Returns:
        The machine, the settings and one row per variant, shape or network, dtype and layout:
        ``*_bytes`` moved in forward and backward, ``*_launches``, and ``saved_bytes`` in addition
        to the input.
    """
    layers = {name: _layer_shapes(name, img_size) for name in networks}
    rows = []
    for dtype in dtypes:
        for layout in layouts:
            setting = Setting(batch_size, dtype, layout)
            for place, shape in shapes.items():
                rows += [_row(place, {shape: 1}, v, setting) for v in VARIANTS]
            for name, counts in layers.items():
                rows += [_row(name, counts, v, setting) for v in VARIANTS]
    settings = {"batch": batch_size, "size": img_size}
    here = machine(torch.device("cpu"))
    return {"bench": "bytes", "machine": here, "settings": settings, "rows": rows}


def _row(place: str, shapes: dict[tuple, int], variant: str, setting: Setting) -> dict:
    row = {"place": place, "variant": variant, **setting._asdict()}
    row["layers"] = sum(shapes.values())
    for shape, times in shapes.items():
        for key, value in count_layer(VARIANTS[variant], shape, setting).items():
            row[key] = row.get(key, 0) + times * value
    return row


@cache
def count_layer(kind: type[EmaAttn], shape: tuple[int, int, int], setting: Setting) -> dict:
    """Count forward and backward of one layer on fake CUDA tensors.

    Args:
        kind: The layer's class.
        shape: (C, H, W).
        setting: Batch, dtype and layout.

    Returns:
        ``input_bytes``, ``forward_bytes``, ``forward_launches``, ``backward_bytes``,
        ``backward_launches`` and ``saved_bytes``; one dictionary for equal arguments.
    """
    dtype = getattr(torch, setting.dtype)
    with FakeTensorMode():
        x = torch.empty(setting.batch, *shape, device="cuda", dtype=dtype)
        x = x.to(memory_format=LAYOUTS[setting.layout]).requires_grad_()
        layer = kind(shape[0], groups=largest_group_count(shape[0]), device="cuda")
        made = []
        with cuda_autocast(dtype), Counter() as forward:
            saved = saved_bytes(lambda: made.append(layer(x)), [x, *layer.parameters()])
        (out,) = made
        grad = torch.empty_like(out)
        with Counter() as back:
            backward(out, grad)
    return {
        "input_bytes": x.numel() * x.element_size(),
        "forward_bytes": forward.bytes,
        "forward_launches": forward.launches,
        "backward_bytes": back.bytes,
        "backward_launches": back.launches,
        "saved_bytes": saved,
    }


def _layer_shapes(name: str, size: int) -> dict[tuple[int, int, int], int]:
    """Number of EMA layers of a network for each shape (C, H, W) of their maps."""
    found: dict[tuple, int] = {}

    def note(module: nn.Module, args: tuple) -> None:
        """Count one call of one layer."""
        shape = tuple(args[0].shape[1:])
        found[shape] = found.get(shape, 0) + 1

    with torch.no_grad(), torch.device("meta"):
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, EmaAttn):
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, size, size))
    return found
