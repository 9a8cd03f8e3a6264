"""The blocks of the guide "Coming from a pasted class", by their headings."""

import re
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[2] / "ema_timm" / "integrations" / "pasted.md"


def blocks(language: str = "python") -> dict[str, list[str]]:
    """The blocks of a language under each heading that has one."""
    parts = re.split(r"^## (.+)$", GUIDE.read_text("utf-8"), flags=re.M)[1:]
    found = {
        heading: re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {heading: texts for heading, texts in found.items() if texts}


def run(heading: str) -> dict:
    """Run the Python blocks under ``heading``, one after another; returns their names."""
    names: dict = {"__name__": "guide"}
    for text in blocks()[heading]:
        exec(text, names)
    return names
