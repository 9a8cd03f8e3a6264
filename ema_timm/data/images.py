"""The only reader of image files: which files are images, and which pixels a network gets.

Training, ``evaluate``, ``predict`` and ``attend`` read every image here. It reads as timm's own
data sets do: Pillow decodes the file and converts it to RGB, or to greyscale for a network of one
input channel. EXIF rotation is not applied, because timm and torchvision do not apply it either.
Pillow's modes become:

==================================  ==============================================================
mode of the file                    pixels
==================================  ==============================================================
1, L, RGB, CMYK, YCbCr, HSV         as ``convert`` gives them
P                                   the colours of the palette
LA, PA, RGBA, RGBa, RGBX            the colours; transparency is ignored
La, LAB                             converted by way of LA and of RGB
I;16, I;16L, I;16B, I;16N           0 to 65535 scaled to 0 to 255; ``convert`` clips them to white
I in PNG and PPM files              the same, because older versions of Pillow use I for 16 bits
I in other files, F                 an error: the file does not say which number is white
==================================  ==============================================================

Of 16-bit colour and of greyscale with transparency Pillow itself keeps the upper 8 bits.
"""

import functools
import os
import stat
import struct
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from ema_timm.errors import UnreadableImageError, UserError, one_line

IMAGE_FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "BMP", "DIB", "GIF", "TIFF",
    "PPM", "TGA", "PCX", "QOI",
)  # fmt: skip
"""Pillow's names of the formats that hold images; it also reads films and documents."""

DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, OverflowError, struct.error,
    Image.DecompressionBombError, ImportError,
)  # fmt: skip
"""What Pillow raises for a damaged file, and for one that is no image.

ImportError: the decoder is not installed. ultralytics replaces ``Image.open`` by a function that
asks for pi_heif whenever Pillow cannot identify a file.
"""

REMEDY = "Repair or remove it."
_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_BY_WAY_OF = {"La": "LA", "LAB": "RGB"}

Source = str | Path | IO[bytes] | Image.Image
"""A file, by name or open, or an image in memory."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the images that Pillow reads here, with its plug-ins."""
    Image.init()
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in IMAGE_FORMATS and (name in Image.OPEN or name == "MPO")  # JPEG's reader
    )


def mode_of(channels: int) -> str:
    """Pillow's mode for a network of so many input channels: "L" for 1, "RGB" for 3.

    Raises:
        UserError: For any other number.
    """
    if channels not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, and the network takes {channels}. Use a network "
            "with in_chans=1 or 3 (finetune: --model-kwargs in_chans=3)."
        )
    return "L" if channels == 1 else "RGB"


def read_image(
    source: Source, mode: str = "RGB", name: str = "", remedy: str = REMEDY
) -> Image.Image:
    """Read an image as every command of this package does.

    Args:
        source: A file, by name or open, or an image in memory.
        mode: "RGB" or "L"; see `mode_of`.
        name: What an error calls the image; the file's name by default.
        remedy: What an error says to do.

    Raises:
        UnreadableImageError: If it cannot be decoded to its end, or has pixels of 32 bits.
    """
    try:
        with source if isinstance(source, Image.Image) else _open(source) as image:
            return _converted(image, mode)
    except DECODING_ERRORS as error:
        raise unreadable(name or str(source), error, remedy) from error


def _open(source: str | Path | IO[bytes]) -> Image.Image:
    if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):
        raise OSError("not a regular file")  # a FIFO would wait for ever, a device may have no end
    return Image.open(source)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if _has_sixteen_bits(image):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    by_way_of = _BY_WAY_OF.get(image.mode)
    if isinstance(image.info.get("transparency"), bytes):
        by_way_of = "RGBA"  # the same pixels, without Pillow's warning
    return (image.convert(by_way_of) if by_way_of else image).convert(mode)


def _has_sixteen_bits(image: Image.Image) -> bool:
    """Whether it is 16-bit greyscale; ValueError for 32 bits."""
    if image.mode in _SIXTEEN_BITS:
        return True
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("pixels of 32 bits; save it with 8 or 16")
    return image.mode == "I"


class Inspection(NamedTuple):
    """Numbers of images that have an EXIF rotation, and of images with 16-bit greyscale."""

    rotated: int = 0
    sixteen_bit: int = 0


def inspect_image(source: Source, decode: bool) -> Inspection | Exception:
    """Open an image file, or decode it to its end; a JPEG at an eighth of its size, for speed.

    Returns:
        What was found, or the error with which decoding ended. An image in memory has neither.
    """
    if isinstance(source, Image.Image):
        return Inspection()
    try:
        with _open(source) as image:
            sixteen_bit = _has_sixteen_bits(image)
            if decode:
                image.draft(None, (1, 1))  # still reads all of a JPEG's data
                image.load()
            return Inspection(int(_is_rotated(image)), int(sixteen_bit))
    except DECODING_ERRORS as error:
        return error


def _is_rotated(image: Image.Image) -> bool:
    try:
        # Not image.getexif(): for a PNG it decodes the image and swallows the errors.
        return Image.Image.getexif(image).get(_ORIENTATION, 1) not in (0, 1)
    except DECODING_ERRORS:
        return False  # damaged EXIF data do not make the image unreadable


def unreadable(name: str, error: Exception, remedy: str = REMEDY) -> UnreadableImageError:
    """The error that says in one line which image cannot be read, why, and what to do."""
    if isinstance(error, Image.DecompressionBombError):
        reason = f"more pixels than Pillow opens ({2 * Image.MAX_IMAGE_PIXELS:,})"
        remedy = "Make it smaller."
    else:
        reason = one_line(error)
        reason = "not an image" if "cannot identify" in reason else reason
    return UnreadableImageError(f"cannot read {name}: {reason}. {remedy}")
