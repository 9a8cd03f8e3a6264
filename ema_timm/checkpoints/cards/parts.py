"""What every card is put together from: a template with blanks, metadata, tables of numbers."""

import re
from importlib import resources
from string import Template

import yaml


def fill(template: str, **values: str) -> str:
    """A file of ``templates/`` with its blanks filled; an empty one leaves no gap."""
    text = resources.files(__package__).joinpath("templates", template).read_text("utf-8")
    return re.sub(r"\n{3,}", "\n\n", Template(text).substitute(values))


def yaml_block(facts: dict) -> str:
    """The metadata at the top of a card; what is not known is left out."""
    known = {key: value for key, value in facts.items() if value}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n"


def table(rows: list[tuple[str, str | None]], title: str = "measured") -> str:
    """A table of two columns; a row without a value is left out."""
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def count_rows(results: dict) -> list[tuple[str, str | None]]:
    """The table rows of what is counted on the network alone."""
    macs = results.get("macs")
    ema = total = definition = None
    if macs:
        total = f"{macs['total']:,}"
        if macs["ema"]:
            ema = f"{macs['ema']:,}"
            definition = f"{macs['ema_definition']:,}"
    return [
        ("Parameters", f"{results['parameters']:,}"),
        ("Multiply-accumulates (convolutions and matrix products, one image)", total),
        ("… of which EMA attention, in the closed form that runs", ema),
        ("… EMA attention by the paper's definition would be", definition),
    ]
