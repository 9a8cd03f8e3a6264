"""The figures of a folder: which ones its card shows, and whether each is a valid image file."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.data.images import DECODING_ERRORS
from ema_timm.errors import UserError, sentence

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}

# The metadata; a block between fences; a span between as many backticks, within a paragraph.
_NO_MARKUP = re.compile(
    r"\A---\n.*?^---$|^(```|~~~).*?^\1|(?<![`\\])(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\2(?!`)",
    re.M | re.S,
)
_ALT = r"(?<!\\)!\[((?:[^\[\]]|\[[^\]]*\])*)\]"
_INLINE = re.compile(_ALT + r"\(\s*(?:<([^<>\n]*)>|((?:[^\s()]|\([^\s()]*\))+))")
_NAMED = re.compile(_ALT + r"(?:\[([^\]]*)\])?(?!\()")
_DEFINED = re.compile(r"^ {0,3}\[([^\]]+)\]:\s*<?([^\s>]+)", re.M)
_HTML = re.compile(r"(?<!\\)<img\b[^>]*?\ssrc\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+))", re.I)
_ELSEWHERE = re.compile(r"(https?:)?//|data:", re.I)


def named_pictures(path: Path, card: str, results: dict) -> list[str]:
    """The figures that a folder's card shows and its results name, each decoded.

    Args:
        path: The folder.
        card: Text of its README.md.
        results: Content of its results.json.

    Returns:
        Names of files in the folder, sorted.

    Raises:
        UserError: If one is in another folder, missing, a link, or not an image of its format.
    """
    plots = results.get("plots") or []
    if not isinstance(plots, list) or not all(isinstance(name, str) for name in plots):
        raise UserError(
            f"{path / RESULTS}: plots must be a list of names, got {plots!r}. Draw them again: "
            f"ema-timm evaluate {path} --data-dir DIR"
        )
    for who, names in ((f"{path / CARD} shows", _shown(card)), (f"{path / RESULTS} names", plots)):
        for name in names:
            _check_place(path, name, f"{who} {name}")
    named = sorted({*_shown(card), *plots})
    for name in named:
        check_real(path / name)
        _check_picture(path / name)
    return named


def other_pictures(path: Path, named: list[str]) -> list[str]:
    """The names of all other figures in a folder."""
    found = (file.name for file in path.iterdir() if file.suffix.lower() in _FORMATS)
    return sorted(name for name in found if name not in named)


def check_real(file: Path) -> None:
    """Raise UserError for a link, which leads out of the folder, and for what is not a file."""
    if file.is_symlink():
        raise UserError(
            f"{file} is a link, but only files of the folder are published. Copy the folder "
            f"without links, and publish the copy: cp -rL {file.parent} FOLDER"
        )
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a file. Put the file of that name there.")


def _shown(card: str) -> list[str]:
    """The images of a card that are not web addresses, as names relative to the card."""
    targets = (
        unquote(html.unescape(target.strip())) for target in _targets(_NO_MARKUP.sub("", card))
    )
    local = (target for target in targets if target and not _ELSEWHERE.match(target))
    # A file://… stays as it is: it is not the name of a file in the folder.
    return [re.sub(r"[?#].*", "", target).removeprefix("./") for target in local]


def _targets(card: str) -> Iterator[str]:
    """Targets of the images in Markdown and HTML."""
    for inline in _INLINE.finditer(card):
        yield inline[2] or inline[3] or ""
    defined = {name.lower(): target for name, target in _DEFINED.findall(card)}
    for alt, name in _NAMED.findall(card):
        yield defined.get((name or alt).lower(), "")
    for image in _HTML.findall(card):
        yield "".join(image)


def _check_place(path: Path, name: str, who: str) -> None:
    """Raise UserError for a figure that is not a file in the card's folder."""
    if name != Path(name).name or "\\" in name or ":" in name:
        raise UserError(
            f"{who}, but a published figure is in the card's folder. Put it into {path} and write "
            "only its name, or give its https address."
        )
    if Path(name).suffix.lower() not in _FORMATS:
        *most, last = _FORMATS
        raise UserError(f"{who}, but a figure is {', '.join(most)} or {last}. Convert it.")
    if not (path / name).exists() and not (path / name).is_symlink():
        raise UserError(
            f"{who}, which is missing. Put it into {path}, or take it out of {CARD} and of plots "
            f"in {RESULTS}."
        )


def _check_picture(file: Path) -> None:
    """Decode a figure in the format of its suffix."""
    kind = _FORMATS[file.suffix.lower()]
    try:
        with Image.open(file, formats=[kind]) as image:
            image.load()
    except DECODING_ERRORS as error:
        raise UserError(
            f"{file} is not a {kind} image: {sentence(error)} Draw it again, or take it out of "
            f"{CARD} and of plots in {RESULTS}."
        ) from error
