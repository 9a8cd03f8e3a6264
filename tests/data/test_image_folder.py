"""Image folders: what they promise, and what is refused before training starts."""

import shutil

import pytest
from PIL import Image
from torchvision.transforms import ToTensor

from ema_timm.data.check import check_readable
from ema_timm.data.folders import TRAIN, VAL
from ema_timm.data.image_folder import open_folder
from ema_timm.errors import UnreadableImageError, UserError


@pytest.fixture
def folder(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "data")


def test_images_and_classes(folder):
    train = open_folder(folder, TRAIN)
    assert len(train) == 60
    assert train.class_names == ["digit_0", "digit_1", "digit_2", "digit_3"]
    train.transform = ToTensor()
    image, target = train[0]
    assert image.shape == (3, 8, 8)
    assert target == 0


def test_greyscale(folder):
    train = open_folder(folder, TRAIN)
    train.transform = ToTensor()
    train.read_channels(1)
    assert train[0][0].shape == (1, 8, 8)
    with pytest.raises(UserError, match="1 or 3 channels, and the network takes 4"):
        train.read_channels(4)


def test_validation_takes_the_class_numbers_of_training(folder):
    shutil.rmtree(folder / "val" / "digit_1")
    train = open_folder(folder, TRAIN)
    val = open_folder(folder, VAL, class_map=train.class_to_idx)
    assert set(val.targets) == {0, 2, 3}
    (folder / "val").rename(folder / "validation")
    assert len(open_folder(folder, VAL)) == len(val)


def test_fingerprint_is_of_names_and_sizes_not_of_the_place(folder, tmp_path):
    before = open_folder(folder, TRAIN).fingerprint()
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_folder(moved, TRAIN).fingerprint() == before
    image = next((moved / "train").rglob("*.png"))
    Image.new("L", (64, 64)).save(image)
    changed = open_folder(moved, TRAIN).fingerprint()
    assert changed != before
    image.rename(image.with_name("other.png"))
    assert open_folder(moved, TRAIN).fingerprint() not in (before, changed)


def test_missing_split(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match=r"has no folder val or validation/.*DIR/train/CLASS"):
        open_folder(folder, VAL)


def test_no_images(tmp_path):
    (tmp_path / "train" / "cats").mkdir(parents=True)
    (tmp_path / "train" / "cats" / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"no images in class folders.*train/CLASS/image\.jpg"):
        open_folder(tmp_path, TRAIN)


def test_class_that_training_lacks(folder):
    shutil.copytree(folder / "val" / "digit_0", folder / "val" / "digit_9")
    train = open_folder(folder, TRAIN)
    with pytest.raises(UserError, match=r"not among those trained on \(digit_0, .*\): digit_9"):
        open_folder(folder, VAL, class_map=train.class_to_idx)


@pytest.mark.parametrize("content", [b"", b"not an image at all"], ids=["empty", "text"])
def test_image_without_a_header_is_named_before_training(folder, content):
    bad = sorted((folder / "train").rglob("*.png"))[7]
    bad.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"{bad}: not an image. Repair or remove"):
        check_readable(open_folder(folder, TRAIN), progress=False)


def test_truncated_image_is_an_error_not_another_image(folder):
    """timm would hand out the next image in its place, with a warning."""
    train = open_folder(folder, TRAIN)
    train.transform = ToTensor()
    path = train.paths[3]
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[: len(content) - 30])
    with pytest.raises(UnreadableImageError, match=path):
        train[3]
