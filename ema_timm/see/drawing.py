"""The figures of ``attend``: images are rows, stages are columns.

Each column has one colour scale for all rows, with its numbers below. The colour maps grow lighter
evenly (viridis, Blues, inferno), so that they can be read in grey and with colour blindness.
"""

from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from ema_timm.figures import class_name, file_name, fitted
from ema_timm.files import write_whole
from ema_timm.see.gates import LayerGates
from ema_timm.see.gradcam import Cam
from ema_timm.see.predictions import Prediction

_DPI = 160
_PANEL, _STRIP, _GAP = 1.7, 0.1, 0.14  # inches
_LEFT, _RIGHT, _TOP, _SCALE = 1.25, 0.15, 0.5, 0.44
_OVER = 0.65  # how much of the image a map covers
_DARK, _LIGHT = 0.35, 0.95  # an image under a map: a wider range would hide the map's colours


class _Scale(NamedTuple):
    """A colour scale: a colour map and its range, over an image or without one."""

    colours: str
    norm: Normalize
    title: str
    over_image: bool = False

    @property
    def style(self) -> dict:
        """Arguments of matplotlib's ``imshow``."""
        return {"cmap": self.colours, "norm": self.norm, "alpha": _OVER if self.over_image else 1}


def group_maps(gates: LayerGates) -> Tensor:
    """One map per group, (B, G, H, W): the mean over its channels if each channel has a map."""
    return gates.gate_map.unflatten(1, (gates.along_height.shape[1], -1)).mean(2)


def save_attention(
    seen: Tensor,
    gates: dict[str, LayerGates],
    cams: Sequence[Cam],
    rows: Sequence[Prediction],
    path: Path,
) -> None:
    """Draw each layer's gate map, mean over groups, over each image, and Grad-CAM.

    The strips at the right and lower edge of a map are the gates along height and width, means
    over channels and groups.

    Args:
        seen: Images as the network sees them, (B, C, H, W), 0 to 1.
        gates: Gates of the layers to show, by name.
        cams: Grad-CAM of one or more networks.
        rows: The most probable class of each image.
        path: PNG file to write.
    """
    page = _Page(len(seen), 1 + len(gates) + len(cams), scales=2)
    page.captions(rows)
    for row, image in enumerate(seen):
        _show(page.panel(row, 0), image)
    page.title(0, "input")
    for column, (name, each) in enumerate(gates.items(), 1):
        _draw_gates(page, column, name, each, seen)
    for column, cam in enumerate(cams, 1 + len(gates)):
        _draw_cam(page, column, cam)
    page.save(path)


def save_groups(
    seen: Tensor, gates: dict[str, LayerGates], rows: Sequence[Prediction], path: Path
) -> None:
    """Draw the maps of all groups of each layer for each image; see `save_attention`."""
    page = _Page(len(seen), 1 + len(gates), scales=1, panel=2.6)
    page.captions(rows)
    for row, image in enumerate(seen):
        _show(page.panel(row, 0), image)
    page.title(0, "input")
    for column, (name, each) in enumerate(gates.items(), 1):
        maps = group_maps(each)
        groups, height, width = maps.shape[1:]
        page.title(column, f"{name}\nall {groups} groups, {height}×{width}")
        scale = _Scale("viridis", _range(maps), "gate A")
        for row, each_map in enumerate(maps):
            _show_tiles(page.panel(row, column), _numpy(each_map), scale)
        page.scale(column, scale, 0)
    page.save(path)


class _Page:
    """A figure whose panels are placed in inches from the upper left."""

    def __init__(self, rows: int, columns: int, scales: int, panel: float = _PANEL):
        self.cell = panel + _STRIP + 0.03
        self.panel_size = panel
        self.rows = rows
        self.width = _LEFT + columns * (self.cell + _GAP) - _GAP + _RIGHT
        self.height = _TOP + rows * (self.cell + _GAP) - _GAP + 0.1 + scales * _SCALE
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Empty axes."""
        box = (left / self.width, 1 - (top + height) / self.height)
        axes = self.figure.add_axes((*box, width / self.width, height / self.height))
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Left and top of a panel."""
        return _LEFT + column * (self.cell + _GAP), _TOP + row * (self.cell + _GAP)

    def panel(self, row: int, column: int) -> Axes:
        """Axes for one map."""
        return self.axes(*self.corner(row, column), self.panel_size, self.panel_size)

    def strips(self, row: int, column: int) -> tuple[Axes, Axes]:
        """Axes at the panel's right and lower edge."""
        left, top = self.corner(row, column)
        edge, size = self.panel_size + 0.03, self.panel_size
        return self.axes(left + edge, top, _STRIP, size), self.axes(left, top + edge, size, _STRIP)

    def text(self, left: float, top: float, text: str, **options) -> None:
        """Text at a place."""
        options = {"fontsize": 8, "va": "top", "parse_math": False, **options}
        self.figure.text(left / self.width, 1 - top / self.height, text, **options)

    def title(self, column: int, text: str) -> None:
        """The text above a column."""
        left, _ = self.corner(0, column)
        self.text(left + self.panel_size / 2, _TOP - 0.06, text, ha="center", va="bottom")

    def captions(self, rows: Sequence[Prediction]) -> None:
        """The text to the left of the rows."""
        for row, each in enumerate(rows):
            _, top = self.corner(row, 0)
            name = fitted(file_name(Path(each.filename).name), 19, 3)
            label = fitted(class_name(each.label[0], each.index[0]), 15, 4)
            lines = f"predicted\n{label}\n{100 * each.prob[0]:.1f}%"
            self.text(0.1, top, name, fontsize=7, color="#555555", linespacing=1.2)
            self.text(0.1, top + 0.08 + 0.13 * len(name.split("\n")), lines, linespacing=1.3)

    def scale(self, column: int, scale: _Scale, place: int) -> None:
        """Draw a colour scale with its numbers below a column; ``place`` counts from the top."""
        left, _ = self.corner(0, column)
        top = _TOP + self.rows * (self.cell + _GAP) - _GAP + 0.1 + _SCALE * place
        axes = self.axes(left, top, self.panel_size, 0.1)
        low, high = scale.norm.vmin, scale.norm.vmax
        box = {"extent": (low, high, 0, 1), "aspect": "auto"}
        if scale.over_image:  # the colours as they are over a medium grey
            axes.imshow([[(_DARK + _LIGHT) / 2]], cmap="gray", vmin=0, vmax=1, **box)
        axes.imshow(np.linspace(low, high, 256)[None], **scale.style, **box)
        ticks = [low, (low + high) / 2, high]
        digits = 2 if high - low > 0.04 else 4
        axes.set_xticks(ticks, [f"{tick:.{digits}f}" for tick in ticks])
        axes.tick_params(labelsize=6.5, length=2, pad=1.5)
        axes.get_xticklabels()[0].set_ha("left")
        axes.get_xticklabels()[-1].set_ha("right")
        self.text(left + self.panel_size / 2, top + 0.26, scale.title, fontsize=7, ha="center")

    def save(self, path: Path) -> None:
        """Write the PNG file."""
        write_whole(path, lambda file: self.figure.savefig(file, format="png", dpi=_DPI))


def _draw_gates(page: _Page, column: int, name: str, gates: LayerGates, seen: Tensor) -> None:
    maps = group_maps(gates).mean(1)  # (B, H, W)
    along_height, along_width = gates.along_height.mean((1, 2)), gates.along_width.mean((1, 2))
    groups, (height, width) = gates.along_height.shape[1], maps.shape[1:]
    page.title(column, f"{name}\n{height}×{width}, mean of {groups} groups")
    scale = _Scale("viridis", _range(maps), "gate A", over_image=True)
    edges = _Scale("Blues", _range(along_height, along_width), "gates along height, width (edges)")
    for row in range(len(seen)):
        _cover(page.panel(row, column), seen[row], maps[row], scale)
        right, below = page.strips(row, column)
        for axes, line in ((right, along_height[row, :, None]), (below, along_width[row, None])):
            axes.imshow(_numpy(line), **edges.style, aspect="auto")
    page.scale(column, scale, 0)
    page.scale(column, edges, 1)


def _draw_cam(page: _Page, column: int, cam: Cam) -> None:
    page.title(column, f"Grad-CAM of {cam.name}\nat {cam.layer}")
    scale = _Scale("inferno", Normalize(0, 1), "Grad-CAM, of its maximum", over_image=True)
    for row, image in enumerate(cam.seen):
        axes = page.panel(row, column)
        _cover(axes, image, cam.maps[row], scale)
        name = class_name(cam.labels[row], cam.classes[row])
        label = f"{fitted(name, 20)}: {100 * cam.probs[row]:.1f}%"
        if not cam.maps[row].any():  # its gradient is against the class everywhere
            label += ", zero everywhere"
        axes.set_xlabel(label, fontsize=7, labelpad=2, parse_math=False)
    page.scale(column, scale, 0)


def _show(axes: Axes, image: Tensor) -> None:
    """Draw an image (C, H, W) in its own colours."""
    pixels = _numpy(image).transpose(1, 2, 0)
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], "gray", vmin=0, vmax=1)


def _cover(axes: Axes, image: Tensor, values: Tensor, scale: _Scale) -> None:
    """Draw a map (h, w) over an image (C, H, W) in grey, each cell over its pixels."""
    grey = _DARK + (_LIGHT - _DARK) * _numpy(image).mean(0)
    extent = (0, grey.shape[1], grey.shape[0], 0)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
    axes.imshow(_numpy(values), **scale.style, extent=extent, interpolation="bilinear")


def _show_tiles(axes: Axes, maps: np.ndarray, scale: _Scale) -> None:
    """Draw maps (G, H, W) side by side, each with its number."""
    groups = len(maps)
    across = ceil(sqrt(groups))
    for group, values in enumerate(maps):
        down, right = divmod(group, across)
        left, top = right * 1.06, down * 1.06
        extent = (left, left + 1, top + 1, top)
        axes.imshow(values, **scale.style, extent=extent)
        number = axes.text(left + 0.05, top + 0.05, str(group), fontsize=5, va="top", color="white")
        number.set_path_effects([withStroke(linewidth=1, foreground="black")])
    down = -(-groups // across)
    axes.set(xlim=(0, across * 1.06), ylim=(down * 1.06, 0), aspect="equal", anchor="N")
    axes.set_axis_off()


def _range(*values: Tensor) -> Normalize:
    """From the smallest to the largest number, with a margin if they are equal."""
    low = min(each.min().item() for each in values)
    high = max(each.max().item() for each in values)
    if high - low < 1e-4:
        low, high = low - 0.01, high + 0.01
    return Normalize(low, high)


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
