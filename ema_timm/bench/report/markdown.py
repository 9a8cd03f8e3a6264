"""Markdown of measurements: tables, captions, and their place in a document."""

from pathlib import Path

from ema_timm.errors import UserError
from ema_timm.names import escape


def caption(result: dict, brief: bool) -> str:
    """What was measured on which machine, in one line; a ``brief`` table has only medians."""
    extent = "" if brief else " (smallest to largest)"
    return (
        f"Measured on {machine_line(result)}: {settings_line(result)}. "
        f"Times are medians in ms{extent}."
    )


def machine_line(result: dict) -> str:
    """The machine and the versions."""
    machine = result["machine"]
    return (
        f"{escape(machine['name'])}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{versions_line(result)}"
    )


def versions_line(result: dict) -> str:
    """The versions."""
    versions = result["machine"]["versions"]
    return escape(
        f"torch {versions['torch']}, timm {versions['timm']}, ema-timm {versions['ema_timm']}"
    )


def settings_line(result: dict) -> str:
    """Every setting with its name."""
    settings = result["settings"].items()
    return escape(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings))


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A table of text, with the first column left-aligned and the others right-aligned."""
    head, *body = ([escape(cell) for cell in line] for line in (header, *rows))
    lines = [head, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time(timing: dict | None) -> str:
    """A cell: median (smallest to largest), or "failed parity" without a time."""
    if timing is None:
        return "failed parity"
    return f"{timing['median']:.2f} ({timing['min']:.2f} to {timing['max']:.2f})"


def number(row: dict, key: str, unit: float, spec: str) -> str:
    """A cell: the value in units of ``unit``; empty if the row has none."""
    return format(row[key] / unit, spec) if key in row else ""


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
