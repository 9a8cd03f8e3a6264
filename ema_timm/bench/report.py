"""A measurement -> a Markdown table, a picture, a README that holds the table."""

from pathlib import Path

from ema_timm.bench.layer import FLOOR
from ema_timm.errors import UserError


def table(result: dict, brief: bool = False) -> str:
    """The Markdown table of a measurement, under a line that names the machine.

    Args:
        result: What one of the measurements returned.
        brief: For a layer, one table of the medians at all places.
    """
    body = {"layer": _layer, "model": _model, "resolution": _resolution}[result["bench"]]
    if brief and result["bench"] == "layer":
        body = _layer_brief
    return f"{caption(result)}\n\n{body(result)}\n"


def caption(result: dict) -> str:
    """What was measured on what, in one line."""
    machine, settings = result["machine"], result["settings"]
    versions = machine["versions"]
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    return (
        f"Measured on {machine['name']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {versions['torch']}, timm {versions['timm']}, ema-timm {versions['ema_timm']}: "
        f"{told}. Times are medians in ms (smallest to largest)."
    )


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time(timing: dict | None) -> str:
    if timing is None:
        return "failed parity"
    return f"{timing['median']:.2f} ({timing['min']:.2f} to {timing['max']:.2f})"


def _layer(result: dict) -> str:
    header = ["variant", "forward", "forward + backward", "× floor", "peak MiB", "saved / x"]
    parts = []
    for place in dict.fromkeys(row["place"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["place"] == place]
        lines = []
        for row in rows:
            both = row.get("both_ms")
            floor = row["forward_floor_ms" if row["variant"] == FLOOR else "both_floor_ms"]
            lines.append(
                [
                    row["variant"],
                    _time(row.get("forward_ms")),
                    "" if row["variant"] == FLOOR else _time(both),
                    f"{both['median'] / floor:.1f}" if both else "",
                    _number(row, "both_peak_bytes", 2**20, ".0f"),
                    _number(row, "saved_bytes", row["input_bytes"], ".2f"),
                ]
            )
        shape = "×".join(map(str, rows[0]["shape"]))
        parts.append(f"**{place}, {shape}**\n\n{_rows(header, lines)}")
    return "\n\n".join(parts)


def _layer_brief(result: dict) -> str:
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
                cells.append("failed parity")
            elif variant == FLOOR:
                cells.append(f"{forward['median']:.2f}")
            else:
                cells.append(f"{forward['median']:.2f} / {both['median']:.1f}")
        lines.append([variant, *cells])
    shapes = ["×".join(map(str, rows[FLOOR, place]["shape"][1:])) for place in places]
    return _rows(["forward / forward + backward, ms", *shapes], lines)


def _number(row: dict, key: str, unit: float, form: str) -> str:
    return format(row[key] / unit, form) if key in row else ""


def _model(result: dict) -> str:
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
        step = _time(row.get("training_ms"))
        peak = [_number(row, "training_peak_bytes", 2**20, ".0f")] if memory else []
        lines.append([row["network"], f"{row['parameters']:,}", *times, step, *peak])
    return _rows(header, lines)


def _resolution(result: dict) -> str:
    names = list(dict.fromkeys(row["network"] for row in result["rows"]))
    times = {(row["network"], row["size"]): row["inference_ms"] for row in result["rows"]}
    lines = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        base = times[names[0], size]["median"]
        ratios = [f"{times[name, size]['median'] / base:.2f}" for name in names[1:]]
        lines.append([f"{size}", *(_time(times[name, size]) for name in names), *ratios])
    return _rows(["px", *names, *(f"{name} / {names[0]}" for name in names[1:])], lines)


def put_into(file: str | Path, name: str, text: str) -> bool:
    """Replace the part of a Markdown file between ``<!-- bench: name -->`` and ``<!-- /bench -->``.

    Returns:
        Whether the file changed.

    Raises:
        UserError: If the file has no such part.
    """
    path = Path(file)
    old = path.read_text(encoding="utf-8")
    start, end = f"<!-- bench: {name} -->\n", "<!-- /bench -->"
    before, found, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{file} has no part between {start.strip()} and {end}. Add both lines.")
    new = f"{before}{start}{text}{end}{after}"
    if new != old:
        path.write_text(new, encoding="utf-8")
    return new != old


def plot(result: dict, file: str | Path) -> None:
    """Draw a measurement as a PNG.

    Raises:
        UserError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'ema-timm[train]'") from error
    draw = {"layer": _plot_layer, "model": _plot_model, "resolution": _plot_resolution}
    figure = Figure(figsize=(10, 5), layout="constrained")
    draw[result["bench"]](result, figure)
    figure.suptitle(f"{result['machine']['name']}, {result['machine']['threads']} threads")
    figure.savefig(file, format="png", dpi=120)


def _plot_layer(result: dict, figure) -> None:
    axes = figure.subplots()
    rows = [row for row in result["rows"] if "both_ms" in row and row["variant"] != FLOOR]
    places = list(dict.fromkeys(row["place"] for row in rows))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ratios = {
            r["place"]: r["both_ms"]["median"] / r["both_floor_ms"]
            for r in rows
            if r["variant"] == variant
        }
        ema = "form" in variant or variant == "fused" or variant.startswith("auto")
        axes.plot(
            [p for p in places if p in ratios],
            list(ratios.values()),
            marker="o",
            linewidth=2.5 if ema else 1,
            label=variant,
        )
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, times the traffic floor")
    axes.tick_params(axis="x", rotation=20)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _plot_model(result: dict, figure) -> None:
    rows = [row for row in result["rows"] if "training_images_per_s" in row]
    for axes, kind in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        axes.barh([r["network"] for r in rows], [r[f"{kind}_images_per_s"] for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{kind}, images/s")


def _plot_resolution(result: dict, figure) -> None:
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
