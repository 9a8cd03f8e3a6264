"""The rows as a Markdown table with what its reader must know, and as CSV."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from ema_timm.checkpoints.folder import CheckpointWriter

_MACS = (
    "Multiply-accumulates are of one image: convolutions, linear layers and matrix products count, "
    "EMA attention in the closed form that runs. Images/s and peak memory are of the training "
    "process, as the runs measured them"
)


def markdown(content: dict) -> str:
    """The table, its notes and the command.

    Args:
        content: Content of compare.json.
    """
    rows = content["rows"]
    columns = [[title, *(cell(row, content) for row in rows)] for title, cell in _COLUMNS]
    columns = [column for column in columns if any(column[1:])]
    titles, *body = zip(*columns, strict=True)
    ruler = ["---" if title in _TEXTS else "---:" for title in titles]
    table = [f"| {' | '.join(cells)} |" for cells in (titles, ruler, *body)]
    return "\n".join([*table, "", _notes(content), "", "```bash", content["command"], "```", ""])


def as_csv(content: dict) -> str:
    """The numbers, not rounded, one row a variant.

    Args:
        content: Content of compare.json.
    """
    rows = [_flat(row, content) for row in content["rows"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict, content: dict) -> dict:
    flat = {"attention": row["variant"], "model": row["model"], "seeds": len(row["seeds"])}
    for name in ("top1", "top5"):
        for key in ("mean", "std"):
            flat[f"{name}_{key}"] = (row.get(name) or {}).get(key)
    for key in ("mean", "low", "high", "pairs", "verdict"):
        flat[f"difference_{key}"] = (row.get("difference") or {}).get(key)
    for key in ("parameters", "macs", "macs_by_definition", "images_per_second", "peak_memory_mib"):
        flat[key] = row.get(key)
    for key in ("latency", "exported_latency"):
        flat[f"{key}_ms"] = _median(key, row, content)
    return {**flat, "start": row.get("start"), "why_not": "; ".join(row["why_not"])}


def _notes(content: dict) -> str:
    images, seeds = content["images"], content["seeds"]
    which = f"seed {seeds[0]}"
    if len(seeds) > 1:
        which = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
    counts = ", ".join(
        f"{images[part]} {part}" for part in ("train", "val", "test") if part in images
    )
    chosen = (
        "the epoch was chosen on the validation images"
        if images["measured_on"] == "test"
        else "on which the epoch was chosen as well, so that they are somewhat too good"
    )
    machine = " and ".join(
        sorted({content[key]["machine"]["name"] for key in _LATENCIES if key in content})
    )
    return (
        f"{content['model']}, {which}; images: {counts or 'none yet'}. Accuracies are of the "
        f"{images['measured_on']} images, {chosen}; ± is the standard deviation over the seeds. "
        "With one seed every variant starts from the same weights outside its attention layers and "
        "sees the same images in the same order. Differences to `none` are paired by seed, with "
        f"Student's {content['confidence']:.0%} interval. Of twenty such intervals one misses zero "
        f"by chance where nothing differs.\n\n{_MACS}."
        + (
            f" Latencies are of one image, the median of rounds in turn, on {machine}."
            if machine
            else ""
        )
    )


def _name(row: dict, content: dict) -> str:
    return f"`{row['variant']}`"


def _accuracy(key: str, row: dict, content: dict) -> str:
    found = row.get(key)
    if not found:
        return ""
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def _difference(row: dict, content: dict) -> str:
    found = row.get("difference")
    if not found:
        return ""
    bounds = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return f"{found['mean']:+.2f}{bounds}".replace("-", "−") + f" {found['verdict']}"


def _rounded(key: str, row: dict, content: dict) -> str:
    return f"{row[key]:,.0f}" if row.get(key) else ""


def _macs(row: dict, content: dict) -> str:
    return f"{row['macs'] / 1e6:,.2f}" if "macs" in row else ""


def _latency(key: str, row: dict, content: dict) -> str:
    median = _median(key, row, content)
    if median is None:
        return content.get(key, {}).get("why_not", {}).get(row["variant"], "")
    return f"{median:.2f}"


def _median(key: str, row: dict, content: dict) -> float | None:
    """Median time in ms of one image, where it was measured."""
    return content.get(key, {}).get("ms", {}).get(row["variant"], {}).get("median")


def _start(row: dict, content: dict) -> str:
    return row.get("start") or ""


def _missing(row: dict, content: dict) -> str:
    return "; ".join(row["why_not"]).replace("|", "\\|")


def _of(key: str, cell: Callable[[str, dict, dict], str]) -> Callable[[dict, dict], str]:
    """A cell of one of several numbers that are written alike."""
    return lambda row, content: cell(key, row, content)


_LATENCIES = ("latency", "exported_latency")
_TEXTS = ("attention", "start", "missing")

_COLUMNS = (
    ("attention", _name),
    ("top-1 (%)", _of("top1", _accuracy)),
    ("top-5 (%)", _of("top5", _accuracy)),
    ("difference to `none` (points)", _difference),
    ("parameters", _of("parameters", _rounded)),
    ("MACs (M)", _macs),
    ("images/s", _of("images_per_second", _rounded)),
    ("peak memory (MiB)", _of("peak_memory_mib", _rounded)),
    ("latency (ms)", _of("latency", _latency)),
    ("latency, ONNX (ms)", _of("exported_latency", _latency)),
    ("start", _start),
    ("missing", _missing),
)
"""Title and cell; a column without any cell is left out."""


# MERGED: compare.json, the table in Markdown and CSV, and the picture where matplotlib is there.
try:
    from ema_timm.compare.picture import save_comparison
except ImportError:  # matplotlib is an extra
    save_comparison = None


def write_report(content: dict, output: Path) -> None:
    """Write compare.json, compare.md, compare.csv and compare.png.

    Args:
        content: What compare.json will hold.
        output: The folder.
    """
    folder = CheckpointWriter(output)
    folder.write_json("compare.json", content)
    folder.write_text("compare.md", markdown(content))
    folder.write_text("compare.csv", as_csv(content))
    if save_comparison is not None and any("top1" in row for row in content["rows"]):
        folder.write("compare.png", lambda path: save_comparison(content, path))
