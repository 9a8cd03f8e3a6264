"""Names as a picture can carry them: in letters that its font has, and short enough."""

from textwrap import wrap

from matplotlib.font_manager import FontProperties, findfont, get_font


def class_name(label: str, index: int) -> str:
    """A class' name, or its number where the font lacks one of its letters."""
    return label if _drawable(label) else f"class {index}"


def file_name(name: str) -> str:
    """A file's name, with ? for letters that the font lacks."""
    return "".join(letter if _drawable(letter) else "?" for letter in name)


def fitted(text: str, width: int, lines: int = 1) -> str:
    """``text`` in at most so many lines of at most ``width`` letters; … stands for the rest."""
    found = wrap(text, width) or [""]
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]
    return "\n".join(found)


def fitted_end(text: str, width: int) -> str:
    """The end of ``text``, which tells file names apart."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _drawable(text: str) -> bool:
    font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(letter)) for letter in text)
