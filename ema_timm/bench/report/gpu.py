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
        worst = max(row["error"] for row in here)
        lines.append([part, variant, f"{worst:.1e}", f"failed: {', '.join(failed)}" * bool(failed)])
    texts = [grid(["parity", "variant", "largest error", ""], lines)]
    for part in result["parts"]:
        title = f"**{part['bench']}: {settings_line(part)}**"
        texts.append(f"{title}\n\n{TABLES[part['bench']](part)}")
    return "\n\n".join(texts)


def plot(result: dict, figure) -> None:
    """Every part, one below the other."""
    parts = result["parts"]
    for part, place in zip(parts, figure.subfigures(len(parts), 1), strict=True):
        place.suptitle(settings_line(part), size=8)
        PLOTS[part["bench"]](part, place)
