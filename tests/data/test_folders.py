"""What an image folder holds is taken, told or refused, never changed in silence."""

import shutil

import numpy as np
import pytest
from PIL import Image, features

from ema_timm.data.folders import TRAIN, VAL, find_split, images_below
from ema_timm.data.image_folder import open_folder, split_folder
from ema_timm.errors import UserError


@pytest.fixture
def folder(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "data")


def picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 7, "uint8")).save(path)


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif", "tif", "tiff", "ppm", "JPEG", "PNG"])
def test_every_format_that_pillow_reads_is_a_class(folder, suffix):
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    picture(folder / "train" / "other" / f"one.{suffix}")
    train = open_folder(folder, TRAIN)
    assert "other" in train.class_names
    assert len(train) == 61


def test_hidden_files_and_folders_are_left_out_and_told(folder):
    shutil.copytree(folder / "train" / "digit_0", folder / "train" / ".ipynb_checkpoints")
    (folder / "train" / "digit_0" / "._0001.png").write_bytes(b"of a Macintosh")
    train = open_folder(folder, TRAIN)
    assert len(train) == 60
    assert len(train.class_names) == 4
    said = "2 hidden files and folders skipped (.ipynb_checkpoints, digit_0/._0001.png)"
    assert any(said in note for note in train.notes)


def test_other_files_and_empty_folders_are_told(folder):
    (folder / "train" / "digit_0" / "Thumbs.db").write_bytes(b"?")
    (folder / "train" / "empty").mkdir()
    train = open_folder(folder, TRAIN)
    assert len(train.class_names) == 4
    assert any("not images (1 .db)" in note for note in train.notes)
    assert any("empty folders skipped" in note and "empty)" in note for note in train.notes)


def test_a_class_of_files_that_cannot_be_read_is_refused(folder):
    for path in (folder / "train" / "digit_2").iterdir():
        path.rename(path.with_suffix(".heic9"))
    with pytest.raises(UserError, match=r"digit_2 holds files, but none that Pillow .*\.heic9"):
        open_folder(folder, TRAIN)


@pytest.mark.parametrize("place", ["x.png", "digit_0/more/x.png", "digit_0/a/b/x.webp"])
def test_images_whose_class_is_not_clear_are_refused(folder, place):
    picture(folder / "train" / place)
    with pytest.raises(UserError, match=place):
        open_folder(folder, TRAIN)


@pytest.mark.parametrize(
    ("link", "to"),
    [("up", "."), ("digit_0/up", ".."), ("digit_0/here", "."), ("digit_9", "digit_0")],
)
def test_a_folder_that_links_lead_to_twice_is_refused(folder, link, to):
    (folder / "train" / link).symlink_to(to, target_is_directory=True)
    with pytest.raises(UserError, match=r"is the same folder as .*through a link"):
        open_folder(folder, TRAIN)


def test_a_split_that_is_a_link_is_read(folder):
    (folder / "val").rename(folder / "elsewhere")
    (folder / "val").symlink_to("elsewhere", target_is_directory=True)
    assert len(open_folder(folder, VAL)) == 23


@pytest.mark.parametrize(
    ("given", "names"),
    [("Train", TRAIN), ("training", TRAIN), ("VAL", VAL), ("Valid", VAL), ("evaluation", VAL)],
)
def test_splits_have_the_names_that_timm_looks_for_in_any_case(tmp_path, given, names):
    (tmp_path / given).mkdir()
    (tmp_path / "test").mkdir()
    assert find_split(tmp_path, names) == tmp_path / given


@pytest.fixture
def flat(digits, tmp_path):
    return shutil.copytree(digits / "train", tmp_path / "flat")


def names_of(dataset):
    return [dataset.file_name(index) for index in range(len(dataset))]


def test_a_part_is_set_aside_of_every_class_and_always_the_same(flat, tmp_path):
    train, val = split_folder(flat, 0.2)
    assert not set(names_of(train)) & set(names_of(val))
    assert sorted(names_of(train) + names_of(val)) == sorted(names_of(split_folder(flat, 0.5)[0])
        + names_of(split_folder(flat, 0.5)[1]))  # fmt: skip
    for there, here in zip(train.class_counts(), val.class_counts(), strict=True):
        assert here == round(0.2 * (there + here))
    moved = shutil.copytree(flat, tmp_path / "moved")
    for before, after in zip((train, val), split_folder(moved, 0.2), strict=True):
        assert before.fingerprint() == after.fingerprint()
    assert train.fingerprint() != val.fingerprint()
    assert set(names_of(val)) <= set(names_of(split_folder(flat, 0.4)[1]))


def test_a_class_of_one_image_cannot_be_divided(flat):
    picture(flat / "lonely" / "x.png")
    with pytest.raises(UserError, match=r"x\.png is the only image of its class"):
        split_folder(flat, 0.2)


def test_images_below_a_folder_are_those_of_its_class_folders(folder):
    shutil.copytree(folder / "train" / "digit_0", folder / "train" / ".hidden")
    shutil.copytree(folder / "train" / "digit_0", folder / "train" / "__MACOSX")
    (folder / "train" / "digit_1" / "._1.png").write_bytes(b"of a Macintosh")
    (folder / "train" / "digit_1" / "notes.txt").write_text("no image")
    picture(folder / "train" / "digit_1" / "one.TIF")
    labelled = open_folder(folder, TRAIN)
    paths, notes = images_below(folder / "train")
    assert paths == labelled.paths
    assert notes == labelled.notes and len(notes) == 2


def test_a_folder_whose_name_is_no_text_is_refused_as_a_class(folder):
    (folder / "train" / "digit_1").rename(folder / "train" / "caf\udce9")
    with pytest.raises(UserError, match=r"class folder .*/train/caf\\udce9 is not UTF-8"):
        open_folder(folder, TRAIN)
