"""The kinds of measurements: one line each; its tables and pictures stand in its own file."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ema_timm.bench.report import bytes as moved
from ema_timm.bench.report import deploy, gpu, layer, markdown, model, resolution
from ema_timm.bench.report.panel import Panel


class Kind(NamedTuple):
    """How a kind of measurement is shown.

    Attributes:
        table: ``table(result)`` gives the whole table in Markdown.
        plot: ``plot(result, figure)`` draws all of it.
        brief: A table of the medians alone, where there is one.
        glance: What of it goes into the picture of what EMA attention costs, if anything.
        caption: ``caption(result)`` gives the line above its table.
    """

    table: Callable[[dict], str]
    plot: Callable[[dict, Any], None]
    brief: Callable[[dict], str] | None = None
    glance: Callable[[dict], Panel] | None = None
    caption: Callable[[dict], str] = markdown.caption


KINDS = {
    "layer": Kind(layer.table, layer.plot, layer.brief, layer.glance),
    "model": Kind(model.table, model.plot, glance=model.glance),
    "resolution": Kind(resolution.table, resolution.plot),
    "gpu": Kind(gpu.table, gpu.plot),
    "bytes": Kind(moved.table, moved.plot, moved.brief, caption=moved.caption),
    "deploy": Kind(deploy.table, deploy.plot),
}


def table(result: dict, brief: bool = False) -> str:
    """The Markdown table of a measurement, under a line that names the machine.

    Args:
        result: What one of the measurements returned.
        brief: Medians alone, where the kind has such a table.
    """
    kind = KINDS[result["bench"]]
    body = kind.brief if brief and kind.brief else kind.table
    return f"{kind.caption(result)}\n\n{body(result)}\n"
