"""Table and plot of ``ema-timm bench deploy``."""

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.deploy import EMA, PLAIN, SE
from ema_timm.bench.report.markdown import grid, time
from ema_timm.names import escape

SHOWN = {EMA: "EMA", SE: "SE", AUTHORS: f"EMA, {AUTHORS}"}


def table(result: dict) -> str:
    """One row per network, runtime and batch size: times relative to the baseline's time."""
    header = ["network", "runtime", "sizes", "batch", "plain, ms"]
    header += [f"{name} / plain" for name in SHOWN.values()]
    header += ["nodes per layer: EMA", *list(SHOWN.values())[1:]]
    lines = []
    for place, rows in _places(result).items():
        ratios = [_ratio(rows, name) for name in SHOWN]
        nodes = [_nodes(rows.get(name, {})) for name in SHOWN]
        plain = time(rows[PLAIN].get("inference_ms"))
        lines.append([*map(str, place), plain, *ratios, *nodes])
    return "\n\n".join([grid(header, lines), *_failures(result)])


def plot(result: dict, figure) -> None:
    """Bars of each variant over the places: inference relative to the baseline."""
    axes = figure.subplots()
    places = _places(result)
    for i, (name, label) in enumerate(SHOWN.items()):
        bars = {}
        for at, rows in enumerate(places.values()):
            if "inference_ms" in rows.get(name, {}) and "inference_ms" in rows[PLAIN]:
                bars[at + 0.25 * i] = _quotient(rows, name)
        axes.barh(list(bars), list(bars.values()), height=0.25, label=label)
    ticks = [", ".join(map(str, place)) for place in places]
    axes.set_yticks([at + 0.25 for at in range(len(places))], ticks)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.9)
    axes.set_xlabel("inference, relative to the plain network")
    axes.legend(fontsize=8)


def _places(result: dict) -> dict[tuple, dict[str, dict]]:
    """Rows by variant, by (network, runtime, sizes, batch)."""
    places = {}
    for row in result["rows"]:
        place = tuple(row[key] for key in ("network", "runtime", "sizes", "batch"))
        places.setdefault(place, {})[row["variant"]] = row
    return places


def _nodes(row: dict) -> str:
    return f"{row['nodes_per_layer']:.0f}" if "nodes_per_layer" in row else ""


def _failures(result: dict) -> list[str]:
    """The errors of networks that a runtime could not load or run, one line each."""
    return [
        escape(
            f"{row['network']}, {row['runtime']}, {row['sizes']} sizes, batch {row['batch']}, "
            f"{row['variant']}: failed ({row['failed']})"
        )
        for row in result["rows"]
        if "failed" in row
    ]


def _ratio(rows: dict[str, dict], name: str) -> str:
    if name not in rows:
        return ""
    if "failed" in rows[name]:
        return "failed"
    if "inference_ms" not in rows[name] or "inference_ms" not in rows[PLAIN]:
        return "failed parity"
    return f"{_quotient(rows, name):.2f}"


def _quotient(rows: dict[str, dict], name: str) -> float:
    return rows[name]["inference_ms"]["median"] / rows[PLAIN]["inference_ms"]["median"]
