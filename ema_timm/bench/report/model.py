"""Tables, plots and panel of ``ema-timm bench model``, also with ``--resolution``."""

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.report.markdown import grid, number, time
from ema_timm.bench.report.panel import Bar, Panel
from ema_timm.errors import UserError


def table(result: dict) -> str:
    """One row per network, with the peak memory of a step if it was measured."""
    header = ["network", "parameters", "inference, images/s", "training, images/s", "step, ms"]
    memory = any("training_peak_bytes" in row for row in result["rows"])
    if memory:
        header.append("step, peak MiB")
    lines = []
    for row in result["rows"]:
        times = [
            f"{row[key]:.1f}" if key in row else "failed parity"
            for key in ("inference_images_per_s", "training_images_per_s")
        ]
        step = time(row.get("training_ms"))
        peak = [number(row, "training_peak_bytes", 2**20, ".0f")] if memory else []
        lines.append([row["network"], f"{row['parameters']:,}", *times, step, *peak])
    return grid(header, lines)


def plot(result: dict, figure) -> None:
    """Images per second: inference next to training."""
    rows = [row for row in result["rows"] if "training_images_per_s" in row]
    for axes, kind in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        axes.barh([r["network"] for r in rows], [r[f"{kind}_images_per_s"] for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{kind}, images/s")


def glance(result: dict) -> Panel:
    """Training images per second of every network, relative to its baseline.

    The baseline of a row is the network with the shortest name that is part of the row's name.

    Raises:
        UserError: If a network has no time, because it failed parity.
    """
    rows = {row["network"]: row for row in result["rows"]}
    failed = [name for name, row in rows.items() if "training_ms" not in row]
    if failed:
        raise UserError(f"{', '.join(failed)} failed parity: fix that and measure again.")
    groups = {}
    for name, row in rows.items():
        plain = min((other for other in rows if other in name), key=len)
        groups.setdefault(plain, []).append(_bar(row, rows[plain]))
    title = (
        "Whole networks: images/s in training,\nrelative to the plain network (longer is better)"
    )
    return Panel(title, "%", 100, groups)


def _bar(row: dict, plain: dict) -> Bar:
    times, base = row["training_ms"], plain["training_ms"]["median"]
    value, low, high = (100 * base / times[key] for key in ("median", "max", "min"))
    text = f"{value:.0f}% · {row['training_images_per_s']:.1f}/s"
    if row is plain:
        return Bar("plain", "base", value, low, high, text)
    name = row["network"].removeprefix(f"{plain['network']}, ")
    # Only networks with EMA layers have an error.
    role = "authors" if name == AUTHORS else "ours" if "error" in row else "other"
    return Bar(name, role, value, low, high, text)


def resolution_table(result: dict) -> str:
    """Rows: sizes. Columns: networks, and their times relative to the first."""
    names = list(dict.fromkeys(row["network"] for row in result["rows"]))
    times = {(row["network"], row["size"]): row["inference_ms"] for row in result["rows"]}
    lines = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        base = times[names[0], size]["median"]
        ratios = [f"{times[name, size]['median'] / base:.2f}" for name in names[1:]]
        lines.append([f"{size}", *(time(times[name, size]) for name in names), *ratios])
    return grid(["px", *names, *(f"{name} / {names[0]}" for name in names[1:])], lines)


def resolution_plot(result: dict, figure) -> None:
    """Time over pixels: one line per network."""
    axes = figure.subplots()
    for name in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["network"] == name]
        axes.plot(
            [row["size"] ** 2 / 1e6 for row in rows],
            [row["inference_ms"]["median"] for row in rows],
            marker="o",
            label=name,
        )
    axes.set_xlabel("megapixels")
    axes.set_ylabel("inference, ms")
    axes.grid(alpha=0.3)
    axes.legend()
