"""The files of a comparison: compare.json, the table in Markdown and as CSV, the figure."""

import csv
import io
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.names import code, escape

_MACS = (
    "Multiply-accumulates are for one image. Convolutions, linear layers and matrix products "
    "count; EMA attention counts in the closed form that runs. Images/s and peak memory are those "
    "of the training process"
)
_DIFFERENCES = (
    "Differences to `none` are of the top-1 accuracy and paired by seed. Their confidence "
    "intervals (Student's t, with Bonferroni's correction for the number of rows) are "
    "{confidence:.0%} for the whole table. Half of an interval's width is the smallest "
    "difference that the row could have shown. The seeds show how much training varies, not how "
    "much other images would."
)
_LATENCIES = ("latency", "exported_latency")
_TEXTS = ("attention", "start", "missing")


def write_report(content: dict, output: Path) -> None:
    """Write compare.json, compare.md, compare.csv and, if matplotlib is installed, compare.png.

    Args:
        content: The content of compare.json.
        output: The folder.
    """
    folder = CheckpointWriter(output)
    folder.write_json("compare.json", content)
    folder.write_text("compare.md", markdown(content))
    folder.write_text("compare.csv", as_csv(content))
    if find_spec("matplotlib") and any("top1" in row for row in content["rows"]):
        from ema_timm.compare.picture import save_comparison

        folder.write("compare.png", lambda path: save_comparison(content, path))


def markdown(content: dict) -> str:
    """The table, its notes and the command.

    Args:
        content: The content of compare.json.
    """
    rows = content["rows"]
    columns = [[title, *(cell(row, content) for row in rows)] for title, cell in _COLUMNS]
    columns = [column for column in columns if any(column[1:])]
    titles, *body = zip(*columns, strict=True)
    ruler = ["---" if title in _TEXTS else "---:" for title in titles]
    table = [f"| {' | '.join(cells)} |" for cells in (titles, ruler, *body)]
    return "\n".join([*table, "", _notes(content), "", "```bash", content["command"], "```", ""])


def as_csv(content: dict) -> str:
    """The numbers, not rounded, with one row for each variant.

    Args:
        content: The content of compare.json.
    """
    rows = [_flat(row, content) for row in content["rows"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict, content: dict) -> dict:
    flat = {"attention": row["variant"], "model": row["model"], "seeds": len(row["seeds"])}
    for name in ("top1", "top5", "balanced_accuracy"):
        for key in ("mean", "std"):
            flat[f"{name}_{key}"] = (row.get(name) or {}).get(key)
    for key in ("mean", "low", "high", "half_width", "pairs", "verdict"):
        flat[f"difference_{key}"] = (row.get("difference") or {}).get(key)
    for key in ("parameters", "macs", "macs_by_definition", "images_per_second", "peak_memory_mib"):
        flat[key] = row.get(key)
    for key in _LATENCIES:
        flat[f"{key}_ms"] = _median(key, row, content)
    return {**flat, "start": row.get("start"), "why_not": "; ".join(row["why_not"])}


def _notes(content: dict) -> str:
    images, seeds = content["images"], content["seeds"]
    which = f"seed {seeds[0]}"
    if len(seeds) > 1:
        which = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
    if _seeds_differ(content):
        which += "; each row is of the seeds in its column `seeds`"
    parts = [part for part in ("train", "val", "test") if part in images]
    counts = ", ".join(f"{images[part]} {part}" for part in parts)
    chosen = (
        "and the epoch was chosen on the validation images"
        if images["measured_on"] == "test"
        else "which the epoch was chosen on as well, so they are slightly too high"
    )
    differences = _DIFFERENCES.format(confidence=content["confidence"])
    notes = (
        f"{content['model']}, {which}; images: {counts or 'none yet'}. Accuracies are on the "
        f"{images['measured_on']} images, {chosen}; ± is the standard deviation over the seeds. "
        "With the same seed, all variants start from the same weights outside their attention "
        f"layers and see the same images in the same order.\n\n{differences}\n\n{_MACS}."
    )
    machines = {content[key]["machine"]["name"] for key in _LATENCIES if key in content}
    if machines:
        notes += (
            " Latencies are for one image, the median of rounds in turn, "
            f"on {' and '.join(sorted(machines))}."
        )
    return notes


def _seeds_differ(content: dict) -> bool:
    return len({tuple(row["seeds"]) for row in content["rows"]}) > 1


def _seeds(row: dict, content: dict) -> str:
    return " ".join(map(str, row["seeds"])) if _seeds_differ(content) else ""


def _name(row: dict, content: dict) -> str:
    return code(row["variant"])


def _accuracy(key: str, row: dict, content: dict) -> str:
    found = row.get(key)
    if not found:
        return ""
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def _difference(row: dict, content: dict) -> str:
    found = row.get("difference")
    if not found:
        return ""
    bounds = f" [{found['low']:+.2f}, {found['high']:+.2f}]" if found["half_width"] else ""
    return f"{found['mean']:+.2f}{bounds}".replace("-", "−") + f" {found['verdict']}"


def _half_width(row: dict, content: dict) -> str:
    half = (row.get("difference") or {}).get("half_width")
    return f"{half:.2f}" if half else ""


def _rounded(key: str, row: dict, content: dict) -> str:
    return f"{row[key]:,.0f}" if row.get(key) else ""


def _macs(row: dict, content: dict) -> str:
    return f"{row['macs'] / 1e6:,.2f}" if "macs" in row else ""


def _latency(key: str, row: dict, content: dict) -> str:
    median = _median(key, row, content)
    if median is None:
        return escape(content.get(key, {}).get("why_not", {}).get(row["variant"], ""))
    return f"{median:.2f}"


def _median(key: str, row: dict, content: dict) -> float | None:
    """Median latency in ms, if it was measured."""
    return content.get(key, {}).get("ms", {}).get(row["variant"], {}).get("median")


def _start(row: dict, content: dict) -> str:
    return row.get("start") or ""


def _missing(row: dict, content: dict) -> str:
    return escape("; ".join(row["why_not"]))


_COLUMNS = (
    ("attention", _name),
    ("seeds", _seeds),
    ("top-1 (%)", partial(_accuracy, "top1")),
    ("top-5 (%)", partial(_accuracy, "top5")),
    ("balanced accuracy (%)", partial(_accuracy, "balanced_accuracy")),
    ("difference to `none` (points)", _difference),
    ("half width (points)", _half_width),
    ("parameters", partial(_rounded, "parameters")),
    ("MACs (M)", _macs),
    ("images/s", partial(_rounded, "images_per_second")),
    ("peak memory (MiB)", partial(_rounded, "peak_memory_mib")),
    ("latency (ms)", partial(_latency, "latency")),
    ("latency, ONNX (ms)", partial(_latency, "exported_latency")),
    ("start", _start),
    ("missing", _missing),
)
"""Title and cell. A column with only empty cells is omitted."""
