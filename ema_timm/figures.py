"""What figures share: colours that all readers can distinguish, and text that the font can draw."""

from textwrap import wrap

OKABE_ITO = {
    "black": "#000000", "orange": "#E69F00", "sky blue": "#56B4E9", "green": "#009E73",
    "vermilion": "#D55E00", "blue": "#0072B2", "purple": "#CC79A7",
}  # fmt: skip
"""Okabe and Ito's colours, which all readers can distinguish, also with colour blindness."""


def drawable(text: str) -> bool:
    """Whether matplotlib's font has every character of ``text``."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(letter)) for letter in text)


def class_name(label: str, index: int) -> str:
    """A class name, or its number if the font lacks one of its characters."""
    return label if drawable(label) else f"class {index}"


def file_name(name: str) -> str:
    """A file's name, with ? for characters that the font lacks."""
    return "".join(letter if drawable(letter) else "?" for letter in name)


def fitted(text: str, width: int, lines: int = 1) -> str:
    """``text`` in at most ``lines`` lines of at most ``width`` characters; … replaces the rest."""
    found = wrap(text, width) or [""]
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]
    return "\n".join(found)


def fitted_end(text: str, width: int) -> str:
    """The end of ``text``, which tells file names apart."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
