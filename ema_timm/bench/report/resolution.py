"""How ``ema-timm bench model --resolution`` is shown."""

from ema_timm.bench.report.markdown import grid, time


def table(result: dict) -> str:
    """Rows: sizes. Columns: networks, and what they take relative to the first."""
    names = list(dict.fromkeys(row["network"] for row in result["rows"]))
    times = {(row["network"], row["size"]): row["inference_ms"] for row in result["rows"]}
    lines = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        base = times[names[0], size]["median"]
        ratios = [f"{times[name, size]['median'] / base:.2f}" for name in names[1:]]
        lines.append([f"{size}", *(time(times[name, size]) for name in names), *ratios])
    return grid(["px", *names, *(f"{name} / {names[0]}" for name in names[1:])], lines)


def plot(result: dict, figure) -> None:
    """Time over pixels: a line a network."""
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
