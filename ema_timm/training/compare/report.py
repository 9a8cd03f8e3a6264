"""compare.json, the table in Markdown and CSV, and the picture where matplotlib is there."""

import csv
import io
from pathlib import Path

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.training.compare.statistics import LEVEL

try:
    from ema_timm.training.compare.picture import save_comparison
except ImportError:  # matplotlib is an extra
    save_comparison = None

_MACS = (
    "Multiply-accumulates are of one image; convolutions, linear layers and matrix products "
    "count, EMA attention in the closed form that runs."
)


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


def markdown(content: dict) -> str:
    """The table, and what a reader must know of it."""
    columns = {title: [write(row, content) for row in content["rows"]] for title, write in _COLUMNS}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    titles = list(columns)
    lines = [
        f"| {' | '.join(titles)} |",
        f"|---|{'---:|' * (len(titles) - 2)}---|",
        *(f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)),
    ]
    return "\n".join([*lines, "", *_notes(content), "", "```bash", content["command"], "```", ""])


def as_csv(content: dict) -> str:
    """The same as CSV, numbers unrounded, one row a variant."""
    text = io.StringIO()
    rows = [_flat(row, content) for row in content["rows"]]
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
        flat[f"{key}_ms"] = _ms(row, content, key)
    return {**flat, "start": row.get("start"), "why_not": "; ".join(row["why_not"])}


def _notes(content: dict) -> list[str]:
    images, seeds = content["images"], content["seeds"]
    counts = f"{images['train']} training, {images['val']} validation" if "train" in images else ""
    test = f", {images['test']} test" if "test" in images else ""
    chosen = "the epoch is the best on the validation images; " if test else (
        "the epoch is the best on the same images, so the numbers are too good; "
    )  # fmt: skip
    return [
        f"{content['model']}, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), images: {counts}"
        f"{test}. Accuracy is of the {images['measured_on']} images, {chosen}± is the standard "
        "deviation over the seeds. One seed gives every variant the same first weights outside its "
        "attention layers, the same order of images and the same augmentation. Differences to "
        f"`none` are paired by seed, with Student's {LEVEL:.0%} interval; of twenty such intervals "
        "without any true difference one will miss zero.",
        "",
        f"{_MACS} Images/s and peak memory are of the training process, as the runs measured them.",
    ]


def _name(row: dict, content: dict) -> str:
    return f"`{row['variant']}`"


def _accuracy(key: str):
    def write(row: dict, content: dict) -> str:
        if not row.get(key):
            return ""
        std = row[key]["std"]
        return f"{row[key]['mean']:.2f}" + ("" if std is None else f" ± {std:.2f}")

    return write


def _difference(row: dict, content: dict) -> str:
    found = row.get("difference")
    if not found:
        return ""
    bounds = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    text = f"{found['mean']:+.2f}{bounds} {found['verdict']}"
    return text.replace("-", "−") if found["low"] is not None else text


def _macs(row: dict, content: dict) -> str:
    return f"{row['macs'] / 1e6:,.2f}" if "macs" in row else ""


def _ms(row: dict, content: dict, key: str) -> float | None:
    return content.get(key, {}).get("ms", {}).get(row["variant"], {}).get("median")


def _latency(key: str):
    def write(row: dict, content: dict) -> str:
        ms = _ms(row, content, key)
        return content.get(key, {}).get("why_not", {}).get(row["variant"], "") if ms is None else (
            f"{ms:.2f}"
        )  # fmt: skip

    return write


def _rounded(key: str):
    def write(row: dict, content: dict) -> str:
        return f"{row[key]:,.0f}" if row.get(key) else ""

    return write


def _start(row: dict, content: dict) -> str:
    return "; ".join([*([row["start"]] if row.get("start") else []), *row["why_not"]])


_COLUMNS = (
    ("attention", _name),
    ("top-1 (%)", _accuracy("top1")),
    ("top-5 (%)", _accuracy("top5")),
    ("difference to `none` (points)", _difference),
    ("parameters", _rounded("parameters")),
    ("MACs (M)", _macs),
    ("images/s", _rounded("images_per_second")),
    ("peak memory (MiB)", _rounded("peak_memory_mib")),
    ("latency (ms)", _latency("latency")),
    ("exported latency (ms)", _latency("exported_latency")),
    ("start, and what is missing", _start),
)
