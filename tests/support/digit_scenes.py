"""A small detection set: handwritten digits of scikit-learn placed on noise, boxes known."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64
_SPLITS = {"train": (0, 1300), "val": (1300, 1797)}  # writers of one split are not in the other


def write_scenes(folder, images):
    """Write pictures and labels as ultralytics reads them; returns the data set's YAML.

    Args:
        folder: An empty folder.
        images: How many pictures, by split ("train", "val").
    """
    generator = np.random.default_rng(0)
    data = load_digits()
    for split, number in images.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(number):
            canvas, lines = _scene(generator, data, _SPLITS[split])
            picture = Image.fromarray(canvas.clip(0, 255).astype("uint8")).convert("RGB")
            picture.save(folder / "images" / split / f"{index:04d}.png")
            (folder / "labels" / split / f"{index:04d}.txt").write_text("".join(lines))
    described = folder / "digits.yaml"
    described.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: digit\n"
    )
    return described


def _scene(generator, data, span):
    """One or two digits that do not overlap, and their label lines."""
    canvas, taken, lines = generator.normal(40, 12, (SIDE, SIDE)), [], []
    for _ in range(generator.integers(1, 3)):
        size = int(generator.integers(18, 29))
        x, y = generator.integers(0, SIDE - size, 2)
        if any(x < a + s and a < x + size and y < b + s and b < y + size for a, b, s in taken):
            continue
        taken.append((x, y, size))
        digit = Image.fromarray((data.images[generator.integers(*span)] * 15).astype("uint8"))
        grown = np.asarray(digit.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        place = canvas[y : y + size, x : x + size]
        np.maximum(place, grown, out=place)
        centre = ((x + size / 2) / SIDE, (y + size / 2) / SIDE)
        lines.append("0 {:.6f} {:.6f} {w:.6f} {w:.6f}\n".format(*centre, w=size / SIDE))
    return canvas, lines
