"""Validation images that are training images too are found, and hardly a file is read for that."""

import shutil

import pytest
from PIL import Image

from ema_timm.data.identical import identical_images
from ema_timm.data.image_folder import LabelledImages
from ema_timm.data.named import open_named
from ema_timm.data.splits import open_both


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(digits, tmp_path / "data")


def shared(folder, **split):
    """Names of the validation images that are training images too."""
    train, val = open_both(folder, **split)
    return sorted(val.file_name(index) for index in identical_images(train, val))


def test_copies_are_found_under_any_name_and_class(folder):
    assert shared(folder) == []
    train = sorted((folder / "train" / "digit_0").iterdir())
    copies = [folder / "val" / "digit_0" / "copy.png", folder / "val" / "digit_3" / "other.jpg"]
    for image, copy in zip(train, copies, strict=False):
        shutil.copy(image, copy)
    assert shared(folder) == sorted(map(str, copies))
    Image.open(train[0]).rotate(90).save(copies[0])  # looked at again: the file has changed
    assert shared(folder) == [str(copies[1])]


def test_a_part_that_is_held_out_is_compared_too(folder):
    for image in list((folder / "train").rglob("*.png")):
        shutil.copy(image, image.with_name(f"twin-{image.name}"))
    shutil.rmtree(folder / "val")
    train, val = open_both(folder, val_split="0.5")
    twins = {path.replace("twin-", "") for path in train.paths}
    expected = [path for path in val.paths if path.replace("twin-", "") in twins]
    assert expected and shared(folder, val_split="0.5") == sorted(expected)


def test_files_of_another_size_are_not_read_and_nothing_is_read_twice(folder, monkeypatch):
    image = next((folder / "train" / "digit_1").iterdir())
    for name in ("one.png", "two.png"):
        (folder / "val" / "digit_1" / name).write_bytes(image.read_bytes() * (2 + len(name)))
    shutil.copy(image, folder / "val" / "digit_1" / "same.png")
    read, content = [], LabelledImages.content

    def noted(self, index, most=None):
        read.append(self.file_name(index))
        return content(self, index, most)

    monkeypatch.setattr(LabelledImages, "content", noted)
    assert shared(folder) == [str(folder / "val" / "digit_1" / "same.png")]
    assert not [name for name in read if name.endswith(("one.png", "two.png"))]
    read.clear()
    shared(folder)
    assert read == []


def test_images_in_memory_are_compared_by_their_pixels(mnist):
    train, val = (open_named("torch/mnist", mnist, split) for split in ("train", "test"))
    assert identical_images(train, val) == []
    val.inner.data[3] = train.inner.data[30]
    assert identical_images(train, val) == [3]
