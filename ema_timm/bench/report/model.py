"""How ``ema-timm bench model`` is shown."""

from ema_timm.bench.report.markdown import grid, number, time


def table(result: dict) -> str:
    """One row a network; the peak memory of a step where it was measured."""
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
    """Images a second: inference beside training."""
    rows = [row for row in result["rows"] if "training_images_per_s" in row]
    for axes, kind in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        axes.barh([r["network"] for r in rows], [r[f"{kind}_images_per_s"] for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{kind}, images/s")
