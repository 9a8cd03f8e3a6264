"""Data that several tests of this folder read."""

import struct

import numpy as np
import pytest


@pytest.fixture
def mnist(tmp_path):
    """A folder in the form of MNIST, 40 images to train on and 20 to test on, of noise."""
    raw, generator = tmp_path / "mnist" / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 0x801, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return tmp_path / "mnist"
