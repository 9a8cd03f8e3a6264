"""Greyscale images in the modes of Pillow."""

import numpy as np
from PIL import Image, ImageCms

_WAYS = {"La": ["LA"], "P": ["L"], "PA": ["P"], "RGBa": ["RGBA"]}


def in_mode(image, mode):
    """An "L" image in one of Pillow's modes: its greys 0 to 255 are 0 to 65535 in 16 bits."""
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.uint16) * 257
        order = ">u2" if mode.endswith("B") else "<u2"
        name = mode if ";" in mode else "I;16"
        deep = Image.frombytes(name, image.size, values.astype(order).tobytes())
        return deep if mode == name else deep.convert(mode)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode="LAB")
    for step in _WAYS.get(mode, ["RGB"]):
        image = image.convert(step)
    return image.convert(mode, dither=Image.Dither.NONE)
