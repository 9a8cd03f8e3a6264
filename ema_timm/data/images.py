"""One image file: which files are images, and how they are read."""

import functools
import struct
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from ema_timm.errors import UnreadableImageError, first_line

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "BMP", "DIB", "GIF", "TIFF",
    "PPM", "TGA", "PCX", "QOI",
)  # fmt: skip
"""Pillow's names of the formats that hold pictures; it also reads films and documents."""

_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, OverflowError, struct.error,
    Image.DecompressionBombError, ImportError,
)  # fmt: skip
"""What Pillow's readers raise for a file that is not what it claims.

ImportError: a reader that is not installed. ultralytics, once imported, puts a function in the
place of ``Image.open`` that asks for pi_heif wherever Pillow cannot identify a file.
"""

_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the pictures that Pillow reads here with its plug-ins."""
    Image.init()
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in FORMATS and (name in Image.OPEN or name == "MPO")  # read by JPEG's reader
    )


def read_image(source: str | Path | IO[bytes], mode: str, name: str, remedy: str) -> Image.Image:
    """Decode an image as timm does, but for 16-bit grey: it is scaled to 8 bits.

    Pillow cuts it off at 255 of 65535, which leaves a white picture. A rotation that a camera
    noted (EXIF) is not applied, as timm does not.

    Args:
        source: A file, by name or open.
        mode: "RGB" or "L".
        name: What to call it in an error.
        remedy: What to do about one that cannot be read.

    Raises:
        UnreadableImageError: If it cannot be decoded whole.
    """
    try:
        with Image.open(source) as image:
            return _scaled(image).convert(mode)
    except _FAULTS as error:
        raise unreadable(name, error, remedy) from error


class Seen(NamedTuple):
    """What is noted of images: how many have a rotation noted in them, how many 16-bit grey."""

    rotated: int
    deep: int


def look(source: str | Path | IO[bytes], decode: bool) -> Seen | Exception:
    """Open an image, or decode it to its end; a JPEG at an eighth of its size, which is faster.

    Returns:
        What it is, or the error with which it ends.
    """
    try:
        with Image.open(source) as image:
            deep = _sixteen_bits(image)
            if decode:
                image.draft(None, (1, 1))  # all of a JPEG's data is still read
                image.load()
            return Seen(int(_rotated(image)), int(deep))
    except _FAULTS as error:
        return error


def unreadable(name: str, error: Exception, remedy: str) -> UnreadableImageError:
    """The error that says, in one line, which image cannot be read and why."""
    if isinstance(error, Image.DecompressionBombError):
        reason = f"more pixels than Pillow opens ({2 * Image.MAX_IMAGE_PIXELS:,})"
        remedy = "Make it smaller."
    else:
        said = first_line(error)
        reason = "not an image" if "cannot identify" in said else said
    return UnreadableImageError(f"cannot read {name}: {reason}. {remedy}")


def _rotated(image: Image.Image) -> bool:
    try:
        # Not image.getexif(), which for a PNG decodes and swallows its faults here.
        return Image.Image.getexif(image).get(_ORIENTATION, 1) not in (0, 1)
    except _FAULTS:
        return False  # damaged notes of a camera do not make the picture unreadable


def _sixteen_bits(image: Image.Image) -> bool:
    """Whether it has 16-bit grey; ValueError for 32 bits, whose white nobody tells."""
    if image.mode in _SIXTEEN_BITS:
        return True
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("pixels of 32 bits; save it with 8 or 16")
    return image.mode == "I"  # Pillow's name for 16 bits in these formats


def _scaled(image: Image.Image) -> Image.Image:
    if not _sixteen_bits(image):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
