"""The kinds of measurements, one line each, and the table of any of them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ema_timm.bench.report import bytes as moved
from ema_timm.bench.report import deploy, layer, markdown, model
from ema_timm.bench.report.markdown import grid, settings_line
from ema_timm.bench.report.panel import Panel
from ema_timm.errors import UserError
from ema_timm.fields import load_json
from ema_timm.names import escape


class Kind(NamedTuple):
    """Tables and pictures of one kind of measurement.

    Attributes:
        table: ``table(result)`` returns the whole table in Markdown.
        plot: ``plot(result, figure)`` draws all of it.
        brief: A shorter table, if there is one.
        glance: Its panel of ``bench picture``, if there is one.
        caption: ``caption(result, brief)`` returns the line above its table.
    """

    table: Callable[[dict], str]
    plot: Callable[[dict, Any], None]
    brief: Callable[[dict], str] | None = None
    glance: Callable[[dict], Panel] | None = None
    caption: Callable[[dict, bool], str] = markdown.caption


_PART_TABLES = {"layer": layer.brief, "model": model.table}
_PART_PLOTS = {"layer": layer.plot, "model": model.plot}


def _gpu_table(result: dict) -> str:
    """The largest error of every variant, then the tables of layers and networks."""
    rows = result["rows"]
    lines = []
    for part, variant in dict.fromkeys((row["part"], row["variant"]) for row in rows):
        here = [row for row in rows if (row["part"], row["variant"]) == (part, variant)]
        failed = [row["place"] for row in here if not row["parity"]]
        errors = [row["error"] for row in here if row["error"] is not None]
        largest = f"{max(errors):.1e}" if errors else ""
        lines.append([part, variant, largest, f"failed: {', '.join(failed)}" * bool(failed)])
    texts = [grid(["parity", "variant", "largest error", ""], lines)]
    for part in result["parts"]:
        title = f"**{part['bench']}: {settings_line(part)}**"
        body = (
            _PART_TABLES[part["bench"]](part)
            if part["rows"]
            else escape(f"failed ({part['failed']})")
        )
        texts.append(f"{title}\n\n{body}")
    return "\n\n".join(texts)


def _gpu_plot(result: dict, figure) -> None:
    """Draw every part, one below the other."""
    parts = [part for part in result["parts"] if part["rows"]]
    for part, place in zip(parts, figure.subfigures(len(parts), 1), strict=True):
        place.suptitle(settings_line(part), size=8)
        _PART_PLOTS[part["bench"]](part, place)


KINDS = {
    "layer": Kind(layer.table, layer.plot, layer.brief, layer.glance),
    "model": Kind(model.table, model.plot, glance=model.glance),
    "resolution": Kind(model.resolution_table, model.resolution_plot),
    "gpu": Kind(_gpu_table, _gpu_plot, caption=lambda result, _: markdown.caption(result, True)),
    "bytes": Kind(moved.table, moved.plot, moved.brief, caption=moved.caption),
    "deploy": Kind(deploy.table, deploy.plot),
}


def table(result: dict, brief: bool = False) -> str:
    """The Markdown table of a measurement, below a line with the machine and the settings.

    Args:
        result: A measurement.
        brief: Use the shorter table, if the kind has one.
    """
    kind = KINDS[result["bench"]]
    brief = brief and kind.brief is not None
    body = kind.brief if brief else kind.table
    return f"{kind.caption(result, brief)}\n\n{body(result)}\n"


@contextlib.contextmanager
def measurement(file: str | Path) -> Iterator[dict]:
    """The measurement in a file that ``ema-timm bench --json`` wrote.

    Raises:
        UserError: If the file or the block that uses it fails because it has another content.
    """
    try:
        yield load_json(Path(file))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a measurement of ema-timm bench --json.") from error
