"""Names of files and classes as text. They may hold any character, and file names any bytes.

Python gives a byte of a file name that is not UTF-8 as a lone surrogate, which no text file takes.
"""

import re

# Control characters, line breaks, changes of direction, and lone surrogates.
_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*\[\]<>|~$]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)")


def encodable(name: str) -> str:
    r"""A name for a UTF-8 file: what UTF-8 cannot hold is written as ``\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(name: str) -> str:
    r"""A name for one line of text: characters that break or hide text are written as ``\n``."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def code(name: str) -> str:
    """A name as code in Markdown, also in a table. It is shown as `printable` writes it.

    Only code is safe from all Markdown: some readers make links of escaped addresses. Vertical bars
    stay outside of the code, because tables of different readers unescape them in different ways.
    """
    return "&#124;".join(map(_span, printable(name).split("|"))) or "` `"


def _span(text: str) -> str:
    if not text:
        return ""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    edges = text[0] + text[-1]
    # A reader removes one space at each end of the code, unless it consists of spaces.
    pad = " " if "`" in edges or (edges == "  " and text.strip(" ")) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def escape(text: str) -> str:
    """Text in Markdown, also in a table, without markup: what would be some is an entity.

    Ordinary words and numbers stay as they are. Names of others are safer as `code`.
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(text))
