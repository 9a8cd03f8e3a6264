"""How ``ema-timm bench gpu`` is shown: parity, then its parts, each as its own kind is."""

from ema_timm.bench.report import layer, model
from ema_timm.bench.report.markdown import grid, settings_line

TABLES = {"layer": layer.brief, "model": model.table}
PLOTS = {"layer": layer.plot, "model": model.plot}


def table(result: dict) -> str:
    """The largest error of every variant, then the medians of layers and networks."""
    rows = result["rows"]
    lines = []
    for part, variant in dict.fromkeys((row["part"], row["variant"]) for row in rows):
        here = [row for row in rows if (row["part"], row["variant"]) == (part, variant)]
        failed = [row["place"] for row in here if not row["parity"]]
        errors = [row["error"] for row in here if row["error"] is not None]
        worst = f"{max(errors):.1e}" if errors else ""
        lines.append([part, variant, worst, f"failed: {', '.join(failed)}" * bool(failed)])
    texts = [grid(["parity", "variant", "largest error", ""], lines)]
    for part in result["parts"]:
        title = f"**{part['bench']}: {settings_line(part)}**"
        body = TABLES[part["bench"]](part) if part["rows"] else f"failed ({part['failed']})"
        texts.append(f"{title}\n\n{body}")
    return "\n\n".join(texts)


def plot(result: dict, figure) -> None:
    """Every part, one below the other."""
    parts = [part for part in result["parts"] if part["rows"]]
    for part, place in zip(parts, figure.subfigures(len(parts), 1), strict=True):
        place.suptitle(settings_line(part), size=8)
        PLOTS[part["bench"]](part, place)
