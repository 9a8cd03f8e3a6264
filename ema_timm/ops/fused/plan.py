"""Where the fused kernels run, and in which blocks they walk the tiles of a shape.

n channels of a group; a tile is one group of one sample, (n, H, W).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ema_timm.ops.fused import whole_tile
from ema_timm.ops.fused.bundles import Size

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128
"""Channels a group the kernels take."""
WIDEST_MAP = 2048
"""Columns of a map the kernels take: a row lies in one block."""
LONGEST = 1 << 31
"""Numbers a sample has less of: offsets within it have 32 bits."""
SHARE = 6272
"""Numbers of a tile for each warp: with 16 warps, tiles fill a multiprocessor's first-level cache."""
THREAD = 16
"""Numbers of a block for each thread."""
PADDING = 1.2
"""Most that a block's numbers may exceed those of the map inside it, where that can be chosen."""


def unavailable(x: Tensor, n: int) -> str | None:
    """Why the kernels cannot take ``x`` in groups of ``n`` channels, or None if they can."""
    if not hasattr(tl, "gather"):
        return f"it needs Triton 3.3 or newer, found {triton.__version__}"
    if x.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16 input, got {x.dtype}"
    if n > WIDEST:
        return f"it takes groups of at most {WIDEST} channels, got {n}"
    if x.shape[3] > WIDEST_MAP:
        return f"it takes maps of at most {WIDEST_MAP} columns, got {x.shape[3]}"
    if x.shape[1] * x.shape[2] * x.shape[3] >= LONGEST:
        return f"it takes samples of less than 2^31 numbers, got {tuple(x.shape[1:])}"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and on AMD's (HIP {torch.version.hip}) nothing is proved"
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
    """Major and minor of one GPU; a constant for who compiles."""
    return torch.cuda.get_device_capability(index)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return not isinstance(whole_tile.forward_tile, triton.runtime.JITFunction)


class Plan(NamedTuple):
    """How the tiles of one shape are walked.

    Attributes:
        tiles: B·G.
        size: What a kernel is told of the shape when it runs.
        warps: Warps of a program.
        forward: What the forward must know when it is compiled.
        backward: The same for the backward.
    """

    tiles: int
    size: Size
    warps: int
    forward: dict
    backward: dict


def plan(x: Tensor, groups: int, last: bool) -> Plan:
    """How to walk ``x``, (B, C, H, W), contiguous or, where ``last``, channels_last."""
    n, height, width = x.shape[1] // groups, *x.shape[2:]
    warps = _power(min(max(n * height * width // SHARE, 1), 8))
    step = _dividing(n if last else width, 16 // x.element_size())
    threads = 32 * warps
    columns = triton.next_power_of_2(width)

    def block(channels: int, each: int) -> tuple[int, int]:
        """Channels and rows of a block with ``each`` numbers a thread."""
        return channels, _fitting(height, max(1, each * threads // (channels * columns)))

    pixels = columns * triton.next_power_of_2(height)
    many = max(8, THREAD * threads // pixels)  # where a map is small, more channels fill a block
    if last:
        along = together = one = max(step, _fitting(n, many))
    else:
        # Lanes along rows and warps along channels; or all channels in a thread; or few channels.
        along, together = _fitting(n, max(many, 2 * warps)), _fitting(n, many)
        one = _fitting(n, max(1, 8 * threads // pixels))
    common = {"n": n, "LAST": last, "VECTOR": step, "BW": columns, "PN": triton.next_power_of_2(n)}
    common["BN"], common["BH"] = block(along, THREAD)
    common["BC"], common["BR"] = block(one, THREAD if last else 8)
    common["BL"] = triton.next_power_of_2(min(height + width, max(16, 1024 // common["PN"])))
    common["BQ"] = 8
    common["BP"] = triton.next_power_of_2(min(max(height, width), 64))
    common["BA"] = _fitting(n, max(1, THREAD * threads // (8 * common["BP"])))
    back = dict(common)
    back["BD"], back["BE"] = block(together, 2 * THREAD)
    if n >= 16 and columns * triton.next_power_of_2(height) >= 16:
        # A product over pixels, which takes at least 16 of them.
        back["BD"] = _fitting(n, 32)
        back["BE"] = max(block(back["BD"], 2 * THREAD)[1], triton.cdiv(16, columns))
    back["PRODUCT"] = (
        back["BD"] * columns * back["BE"] >= 256 and back["BE"] * columns >= 16 and n >= 16
    )
    back["BX"] = max(1, 4096 // common["PN"] ** 2)
    tiles, size = x.shape[0] * groups, Size(groups, height, width)
    back["NARROW"] = step if last else min(step, 4)
    return Plan(tiles, size, warps, common, back)


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
