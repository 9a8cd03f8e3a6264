"""Tables and plot of ``ema-timm bench bytes``."""

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.report.markdown import grid, settings_line, versions_line
from ema_timm.names import escape

FEWEST_MAPS = 5
"""Maps that any training step moves: the forward reads one and writes one; the backward reads two
and writes one."""


def caption(result: dict, brief: bool) -> str:
    """What was counted, in one line."""
    operators = "" if brief else ", with the number of operators in parentheses"
    moved = f"forward and backward, at least {FEWEST_MAPS}{operators}"
    return (
        f"Counted on CUDA's path without a GPU, with {versions_line(result)}: "
        f"{settings_line(result)}. "
        "Units are the size of the input x. Moved: bytes that PyTorch's operators read and write "
        f"in {moved}. Saved: activations saved for the backward, without the input. Half precision "
        "is under autocast."
    )


def table(result: dict) -> str:
    """One table per dtype and memory format; a network's row is the sum over its layers."""
    header = ["map", "variant", "forward", "forward + backward", "of the authors'", "saved / x"]
    parts = []
    settings = dict.fromkeys((row["dtype"], row["layout"]) for row in result["rows"])
    for dtype, layout in settings:
        rows = [row for row in result["rows"] if (row["dtype"], row["layout"]) == (dtype, layout)]
        base = {row["place"]: _both(row) for row in rows if row["variant"] == AUTHORS}
        lines = [_line(row, base[row["place"]]) for row in rows]
        parts.append(f"**{escape(dtype)}, {escape(layout)}**\n\n{grid(header, lines)}")
    return "\n\n".join(parts)


def brief(result: dict) -> str:
    """Only networks: bytes moved and saved by the authors' code and by "auto"."""
    networks = [row for row in result["rows"] if row["layers"] > 1]
    rows = {(r["place"], r["dtype"], r["layout"], r["variant"]): r for r in networks}
    lines = []
    for place, dtype, layout in dict.fromkeys(key[:3] for key in rows):
        base, ours = (rows[place, dtype, layout, variant] for variant in (AUTHORS, "auto"))
        moved = [_units(row, _both(row)) for row in (base, ours)]
        saved = [_units(row, row["saved_bytes"]) for row in (base, ours)]
        cells = [*(f"{m:.1f}" for m in moved), f"{moved[1] / moved[0]:.2f}"]
        lines.append([f"{place}, {dtype}, {layout}", *cells, *(f"{s:.2f}" for s in saved)])
    header = [f"moved / x, {AUTHORS}", "auto", "ratio", f"saved / x, {AUTHORS}", "auto"]
    return grid(["layers of a network", *header], lines)


def plot(result: dict, figure) -> None:
    """Bars of forward + backward in sizes of the input: both variants at every map, bfloat16."""
    for axes, layout in zip(figure.subplots(1, 2), ("contiguous", "channels_last"), strict=True):
        rows = [r for r in result["rows"] if (r["dtype"], r["layout"]) == ("bfloat16", layout)]
        for offset, variant in ((-0.2, AUTHORS), (0.2, "auto")):
            here = [row for row in rows if row["variant"] == variant]
            heights = [_units(row, _both(row)) for row in here]
            axes.barh([i + offset for i in range(len(here))], heights, 0.4, label=variant)
            axes.set_yticks(range(len(here)), [row["place"] for row in here])
        axes.invert_yaxis()
        axes.set_xlabel(f"bfloat16, {layout}: forward + backward / x")
        axes.legend()


def _line(row: dict, base: int) -> list[str]:
    launches = [row[f"{way}_launches"] // row["layers"] for way in ("forward", "backward")]
    return [
        row["place"],
        row["variant"],
        f"{_units(row, row['forward_bytes']):.1f} ({launches[0]})",
        f"{_units(row, _both(row)):.1f} ({sum(launches)})",
        f"{_both(row) / base:.2f}",
        f"{_units(row, row['saved_bytes']):.2f}",
    ]


def _both(row: dict) -> int:
    return row["forward_bytes"] + row["backward_bytes"]


def _units(row: dict, count: int) -> float:
    return count / row["input_bytes"]
