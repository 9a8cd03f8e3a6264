"""Where the fused kernels run, and how they cut the tiles of a shape.

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
WIDEST_TILE = 32
"""Channels a group one program takes: n × n numbers of the 1×1 convolution live in registers."""
TILE_BYTES = 128 << 10
"""Bytes of a tile one program takes: half of the first-level cache of an A100 or H100."""
MIXING = 1 << 14
"""Products of the 1×1 convolution of one row of pooled columns that one program holds."""
BLOCK = 2048
"""Numbers in a block: 16 for each thread of four warps, which leaves room for three programs."""


def unavailable(x: Tensor, n: int) -> str | None:
    """Why the kernels cannot take ``x`` in groups of ``n`` channels, or None if they can."""
    if not hasattr(tl, "gather"):
        return f"it needs Triton 3.3 or newer, found {triton.__version__}"
    if x.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16 input, got {x.dtype}"
    if n > WIDEST:
        return f"it takes groups of at most {WIDEST} channels, got {n}"
    if interpreted():
        return None
    if x.device.type != "cuda":
        return (
            f"it needs a CUDA GPU and the input is on {x.device} (under Triton's interpreter, "
            "TRITON_INTERPRET=1, it also runs on the CPU, very slowly)"
        )
    if torch.version.hip is None and compute_capability(x.device.index) < (8, 0):
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
    """How the tiles of one shape are cut.

    Attributes:
        whole: One program takes a tile from end to end.
        channels: Channels of a block.
        rows: Rows of a block.
        columns: Columns of a block.
        warps: Warps of a program.
        tiles: B·G.
        groups: G.
        n: Channels of a group.
        height: H.
        width: W.
    """

    whole: bool
    channels: int
    rows: int
    columns: int
    warps: int
    tiles: int
    groups: int
    n: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks that cover a map, down and across."""
        return triton.cdiv(self.height, self.rows), triton.cdiv(self.width, self.columns)

    @property
    def blocks(self) -> int:
        """Blocks of pixels that cover a map."""
        down, across = self.grid
        return down * across

    @property
    def channel_blocks(self) -> int:
        """Blocks of channels that cover a group."""
        return triton.cdiv(self.n, self.channels)

    @property
    def block_grid(self) -> tuple[int, int]:
        """Axes of a grid in which a program takes one block of pixels and channels."""
        return self.blocks, self.channel_blocks

    @property
    def size(self) -> Size:
        """What a kernel is told of the shape when it runs."""
        return Size(self.groups, self.height, self.width)

    @property
    def constants(self) -> dict:
        """What a kernel must know of the cut when it is compiled."""
        return {"n": self.n, "BN": self.channels, "BH": self.rows, "BW": self.columns}


def plan(x: Tensor, groups: int) -> Plan:
    """How to cut ``x``, (B, C, H, W)."""
    n, height, width = x.shape[1] // groups, *x.shape[2:]
    channels, columns = triton.next_power_of_2(n), triton.next_power_of_2(width)
    whole = (
        n <= WIDEST_TILE
        and channels * columns <= BLOCK
        and channels * channels * columns <= MIXING
        and n * height * width * x.element_size() <= TILE_BYTES
    )
    if not whole:
        channels, columns = min(channels, 32), min(columns, 64)
    rows = min(triton.next_power_of_2(height), max(1, BLOCK // (channels * columns)))
    warps = 8 if channels >= 32 else 4
    tiles = x.shape[0] * groups
    return Plan(whole, channels, rows, columns, warps, tiles, groups, n, height, width)


def vectors_of(n: int, *maps: Tensor) -> dict:
    """The layout and the widest loads that all maps allow, in numbers.

    Triton finds out by itself only what 16 divides, and 56, 28 and 14 are not such numbers.
    """
    last = all(m.stride(1) == 1 and m.stride(3) != 1 for m in maps)
    size = n if last else maps[0].shape[3]
    width = 16 // maps[0].element_size()
    while width > 1 and (size % width or not all(_steps(m, last, width) for m in maps)):
        width //= 2
    return {"VECTOR": width, "LAST": last}


def _steps(m: Tensor, last: bool, width: int) -> bool:
    """Whether one stride is 1 and ``width`` divides the others."""
    fast, *slow = (m.stride(1), m.stride(3)) if last else (m.stride(3), m.stride(1))
    return fast == 1 and all(s % width == 0 for s in (*slow, m.stride(0), m.stride(2)))
