"""Tables, plot and panel of ``ema-timm bench layer``."""

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.layer import CLONE
from ema_timm.bench.report.markdown import grid, number, time
from ema_timm.bench.report.panel import Bar, Panel
from ema_timm.errors import UserError
from ema_timm.names import escape

GLANCE_NETWORK = "resnet50 "
"""The picture shows places that start with this."""

YARDSTICK = "se"
GLANCE = {
    AUTHORS: (f"EMA, {AUTHORS}", "authors"),
    "closed_form": ("EMA, ema-timm", "ours"),
    YARDSTICK: ("SE, timm", "base"),
}
"""Name and role of the variants that the picture shows."""


def table(result: dict) -> str:
    """One table per place: time, time over the least time of the memory traffic, memory."""
    header = ["variant", "forward", "forward + backward", "× lower bound", "peak MiB", "saved / x"]
    parts = []
    for place in dict.fromkeys(row["place"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["place"] == place]
        lines = []
        for row in rows:
            both = row.get("both_ms")
            floor = row["forward_floor_ms" if row["variant"] == CLONE else "both_floor_ms"]
            lines.append(
                [
                    row["variant"],
                    "failed" if "failed" in row else time(row.get("forward_ms")),
                    "" if row["variant"] == CLONE or "failed" in row else time(both),
                    f"{both['median'] / floor:.1f}" if both else "",
                    number(row, "both_peak_bytes", 2**20, ".0f"),
                    number(row, "saved_bytes", row["input_bytes"], ".2f"),
                ]
            )
        shape = "×".join(map(str, rows[0]["shape"]))
        parts.append(f"**{escape(place)}, {shape}**\n\n{grid(header, lines)}")
    return "\n\n".join([*parts, *_failures(result)])


def _failures(result: dict) -> list[str]:
    """The errors of variants that could not run, one paragraph each."""
    return [
        escape(f"{row['place']}, {row['variant']}: failed ({row['failed']})")
        for row in result["rows"]
        if "failed" in row
    ]


def brief(result: dict) -> str:
    """Rows: variants. Columns: places. Cells: forward / forward + backward, medians in ms."""
    rows = {(row["variant"], row["place"]): row for row in result["rows"]}
    places = list(dict.fromkeys(place for _, place in rows))
    lines = []
    for variant in dict.fromkeys(variant for variant, _ in rows):
        cells = []
        for place in places:
            row = rows[variant, place]
            forward, both = row.get("forward_ms"), row.get("both_ms")
            if forward is None:
                cells.append("failed" if "failed" in row else "failed parity")
            elif variant == CLONE:
                cells.append(f"{forward['median']:.2f}")
            else:
                cells.append(f"{forward['median']:.2f} / {both['median']:.1f}")
        lines.append([variant, *cells])
    shapes = ["×".join(map(str, rows[CLONE, place]["shape"][1:])) for place in places]
    text = grid(["forward / forward + backward, ms", *shapes], lines)
    return "\n\n".join([text, *_failures(result)])


def plot(result: dict, figure) -> None:
    """One line per variant over the places: time over the least time of the memory traffic."""
    axes = figure.subplots()
    rows = [row for row in result["rows"] if "both_ms" in row and row["variant"] != CLONE]
    places = list(dict.fromkeys(row["place"] for row in rows))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ratios = {
            r["place"]: r["both_ms"]["median"] / r["both_floor_ms"]
            for r in rows
            if r["variant"] == variant
        }
        ema = any("parity" in row for row in rows if row["variant"] == variant)
        axes.plot(
            [p for p in places if p in ratios],
            list(ratios.values()),
            marker="o",
            linewidth=2.5 if ema else 1,
            label=variant,
        )
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, times the lower bound")
    axes.tick_params(axis="x", rotation=20)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def glance(result: dict) -> Panel:
    """Forward + backward in the stages of ResNet-50, relative to SE.

    Raises:
        UserError: If a variant has no time, because it failed parity.
    """
    rows = {(row["place"], row["variant"]): row for row in result["rows"]}
    groups = {}
    for place in dict.fromkeys(place for place, _ in rows):
        if place.startswith(GLANCE_NETWORK):
            here = {variant: rows[place, variant] for variant in GLANCE}
            shape = "×".join(map(str, here[YARDSTICK]["shape"][1:]))
            stage = place.removeprefix(GLANCE_NETWORK)
            groups[f"{stage}, {shape}"] = _bars(here)
    title = (
        "One layer of ResNet-50: time of forward + backward,\nrelative to SE (shorter is better)"
    )
    return Panel(title, "×", 1, groups)


def _bars(rows: dict[str, dict]) -> list[Bar]:
    failed = [name for name, row in rows.items() if "both_ms" not in row]
    if failed:
        raise UserError(f"{', '.join(failed)} failed parity: fix that and measure again.")
    base = rows[YARDSTICK]["both_ms"]["median"]
    bars = []
    for variant, (name, role) in GLANCE.items():
        times = rows[variant]["both_ms"]
        value, low, high = (times[key] / base for key in ("median", "min", "max"))
        bars.append(Bar(name, role, value, low, high, f"{value:.1f}× · {times['median']:.1f} ms"))
    return bars
