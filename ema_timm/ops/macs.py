"""Multiply-accumulates of one layer: the closed form's, which run, and those of the definition.

Convolutions and matrix products count, a product with its sum once; nothing else does. T tiles
(the groups of every image), n channels of a group, H height, W width. Both forms mix the means of
rows and columns by the 1×1 convolution, n²(H + W) a tile. Beside that stand in a tile

- in the closed form 9nHW for the collapsed 3×3 convolution, nHW for the votes of the normalised
  branch, 9n² for the weights of the votes;
- in the definition 9n²HW for the 3×3 convolution, 2nHW for the two matrix products.

Without cross-spatial learning there are no such products and no closed form: n²(H + W) + 9n²HW.
"""


def closed_form_macs(tiles: int, n: int, height: int, width: int) -> int:
    """What the closed form computes of ``tiles`` maps (n, height, width)."""
    return tiles * (n * n * (height + width) + 10 * n * height * width + 9 * n * n)


def definition_macs(tiles: int, n: int, height: int, width: int) -> int:
    """What the paper's definition computes of ``tiles`` maps (n, height, width)."""
    return parallel_macs(tiles, n, height, width) + tiles * 2 * n * height * width


def parallel_macs(tiles: int, n: int, height: int, width: int) -> int:
    """`definition_macs` without cross-spatial learning."""
    return tiles * (n * n * (height + width) + 9 * n * n * height * width)
