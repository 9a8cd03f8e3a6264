"""Multiply-accumulates of one layer: of the closed form, which runs, and of the authors' code.

Only convolutions and matrix products count, a product with its sum once. T tiles (the groups of
every image), n channels of a group, H height, W width. Both mix the means of rows and columns by
the 1×1 convolution, n²(H + W) a tile. The rest of a tile is

- in the closed form 9nHW for the collapsed 3×3 convolution, nHW for the weighted sum of the
  normalised branch, 9n² for the cross-spatial weights u;
- in the authors' code 9n²HW for the 3×3 convolution, 2nHW for the two matrix products.

Without cross-spatial learning there are no such products and no closed form: n²(H + W) + 9n²HW.
"""


def closed_form_macs(tiles: int, n: int, height: int, width: int) -> int:
    """Multiply-accumulates of the closed form on ``tiles`` maps (n, height, width)."""
    return tiles * (n * n * (height + width) + 10 * n * height * width + 9 * n * n)


def definition_macs(tiles: int, n: int, height: int, width: int) -> int:
    """Multiply-accumulates of the authors' code on ``tiles`` maps (n, height, width)."""
    return parallel_macs(tiles, n, height, width) + tiles * 2 * n * height * width


def parallel_macs(tiles: int, n: int, height: int, width: int) -> int:
    """`definition_macs` without cross-spatial learning."""
    return tiles * (n * n * (height + width) + 9 * n * n * height * width)
