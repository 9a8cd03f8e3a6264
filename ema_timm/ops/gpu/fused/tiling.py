"""Where the fused kernels run, and in which blocks they pass over the tiles of a shape.

n channels of a group; a tile is one group of one sample, (n, H, W).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ema_timm.ops.gpu.fused import forward
from ema_timm.ops.gpu.fused.kernel_args import Size

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128
"""Most channels of a group."""
WIDEST_MAP = 2048
"""Most columns of a map: a row must fit in one block."""
LONGEST = 1 << 31
"""A sample must have fewer elements: offsets within it have 32 bits."""
SHARE = 6272
"""Elements of a tile for each warp: the tiles of 16 warps fill the first-level cache."""
THREAD = 16
"""Elements of a block for each thread."""
PADDING = 1.2
"""Largest ratio of a block's elements to those of the map inside it, where there is a choice."""


def unavailable(x: Tensor, n: int) -> str | None:
    """Why the kernels do not support ``x`` in groups of ``n`` channels, or None if they do."""
    if not hasattr(tl, "gather"):
        return f"it needs Triton 3.3 or newer, found {triton.__version__}"
    if x.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16 input, got {x.dtype}"
    if n > WIDEST:
        return f"it takes groups of at most {WIDEST} channels, got {n}"
    if x.shape[3] > WIDEST_MAP:
        return f"it takes maps of at most {WIDEST_MAP} columns, got {x.shape[3]}"
    if x.shape[1] * x.shape[2] * x.shape[3] >= LONGEST:
        return f"it takes samples of less than 2^31 elements, got {tuple(x.shape[1:])}"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return f"it needs an NVIDIA GPU and has not been tested on AMD's (HIP {torch.version.hip})"
    if x.device.type != "cuda":
        return (
            f"it needs a CUDA GPU and the input is on {x.device} (under Triton's interpreter, "
            "TRITON_INTERPRET=1, it also runs on the CPU, very slowly)"
        )
    if compute_capability(x.device.index) < (8, 0):
        major, minor = compute_capability(x.device.index)
        return f"it needs compute capability 8.0 or newer, {x.device} has {major}.{minor}"
    return None


@torch.compiler.assume_constant_result
def compute_capability(index: int) -> tuple[int, int]:
    """Major and minor version of one GPU, a constant to `torch.compile`."""
    return torch.cuda.get_device_capability(index)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return not isinstance(forward.forward_tile, triton.runtime.JITFunction)


class Tiling(NamedTuple):
    """How the kernels pass over the tiles of one shape.

    Attributes:
        tiles: B·G.
        size: The sizes that a kernel gets when it runs.
        warps: Warps of a program.
        forward: The constants that the forward is compiled with.
        backward: The same for the backward.
        registers: Limit for a thread of the backward where fewer make room for more warps, or None.
    """

    tiles: int
    size: Size
    warps: int
    forward: dict
    backward: dict
    registers: int | None


def make_tiling(x: Tensor, groups: int, last: bool) -> Tiling:
    """The tiling of ``x``, (B, C, H, W), which is channels_last if ``last``, else contiguous."""
    n, height, width = x.shape[1] // groups, *x.shape[2:]
    warps = _power(min(max(n * height * width // SHARE, 1), 8))
    step = _dividing(n if last else width, 16 // x.element_size())
    forward = {
        **{"n": n, "PN": triton.next_power_of_2(n), "LAST": last, "VECTOR": step},
        "EVEN": _dividing(height, 4),
        **_forward_blocks(n, height, width, warps, step if last else 0),
    }
    backward = {**forward, **_backward_blocks(forward, height, warps)}
    size = Size(groups, height, width)
    sparing = (last or not backward["PRODUCT"]) and warps > 1 and x.element_size() == 2
    return Tiling(x.shape[0] * groups, size, warps, forward, backward, 168 if sparing else None)


def blocks_over_tiles(n: int) -> tuple[int, dict]:
    """Programs and blocks of `ema_timm.ops.gpu.fused.weight_gradients.sum_tiles`."""
    across = 16 if n <= 32 else 32
    along, columns = across if n > 64 else 16, max(8, triton.next_power_of_2(n * n // 128))
    products = triton.cdiv(n, along) * triton.cdiv(9 * n, across)
    programs = products + triton.cdiv(4 * n + n * n, columns)
    steps = {"BT": 64, "BS": 4096 // columns}
    return programs, {"BO": along, "BK": across, "BJ": columns, **steps}


def _forward_blocks(n: int, height: int, width: int, warps: int, step: int) -> dict:
    """Blocks of the forward, as `ema_timm.ops.gpu.fused.forward.forward_tile` takes them.

    Args:
        n: Channels of a group.
        height: H.
        width: W.
        warps: Warps of a program.
        step: Channels that are loaded at once, 0 where they are not neighbours in memory.
    """
    columns, numbers = triton.next_power_of_2(width), THREAD * 32 * warps
    pixels = columns * triton.next_power_of_2(height)
    many = max(8, numbers // pixels)  # where a map is small, more channels fill a block
    if step:
        along = few = max(step, _fitting(n, many))
    else:  # lanes along rows, and warps along channels or rows
        along, few = _fitting(n, max(many, 2 * warps)), _fitting(n, max(1, numbers // 2 // pixels))
    rows = _rows(height, numbers if step else numbers // 2, few * columns)
    half = max(1, rows // 2)
    if triton.cdiv(height, half) * half < triton.cdiv(height, rows) * rows:
        rows = half
    lines = triton.next_power_of_2(min(max(height, width), 64))
    return {
        "BN": along,
        "BH": _rows(height, numbers, along * columns),
        "BC": few,
        "BR": rows,
        "BW": columns,
        "BA": _fitting(n, max(1, step, numbers // (8 * lines))),
        "BP": lines,
        "BQ": 8,
        "BL": triton.next_power_of_2(
            min(height + width, max(16, 1024 // triton.next_power_of_2(n)))
        ),
    }


def _backward_blocks(forward: dict, height: int, warps: int) -> dict:
    """Constants that the backward has in addition to the forward's, or instead of them."""
    n, columns, step = forward["n"], forward["BW"], forward["VECTOR"]
    numbers = THREAD * 32 * warps
    product = _fitting(n, 32) >= 16 and columns * triton.next_power_of_2(height) >= 16
    channels = _fitting(n, 32) if product else max(_fitting(n, 8), forward["LAST"] * forward["BN"])
    if product:  # in channels_last more would spill
        numbers *= 1 if forward["LAST"] else 2
    else:  # ten sums an element
        numbers //= 2
    rows = _rows(height, numbers, channels * columns)
    return {
        "NARROW": step if forward["LAST"] else min(step, 4),
        "PRODUCT": product,
        "BD": channels,
        "BE": max(rows, triton.cdiv(16, columns)) if product else rows,
        "BQ": 2,
        "BX": max(1, 4096 // forward["PN"] ** 2),
    }


def _rows(height: int, numbers: int, row: int) -> int:
    """Rows of a block of ``numbers`` elements whose rows have ``row`` elements."""
    return _fitting(height, max(1, numbers // row))


def _power(number: int) -> int:
    """The largest power of two that is not above ``number``."""
    return 1 << (number.bit_length() - 1)


def _dividing(number: int, most: int) -> int:
    """The largest power of two, at most ``most``, that divides ``number``."""
    return min(number & -number, most)


def _fitting(number: int, most: int) -> int:
    """The largest power of two, at most ``most``, whose multiple above ``number`` is near it."""
    size = min(_power(most), triton.next_power_of_2(number))
    while size > 1 and triton.cdiv(number, size) * size > PADDING * number:
        size //= 2
    return size
