"""Images are read as timm reads them, but for 16-bit grey; what cannot be read is named."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_modes import in_mode
from timm.data import ImageDataset

import ema_timm.data.image_folder as data_module
from ema_timm.data.check import check_readable
from ema_timm.data.folders import TRAIN
from ema_timm.data.image_folder import open_folder
from ema_timm.data.images import inspect_image, read_image
from ema_timm.errors import UnreadableImageError


def noise(shape=(40, 56, 3)):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(noise()).save(tmp_path / "train" / name / f"{index}.jpg")
    return tmp_path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, suffix):
    file = tmp_path / f"deep.{suffix}"
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    if suffix == "pgm":
        file.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(file)
    assert np.asarray(read_image(file, "L", "x", "")).tolist() == [[0, 1, 100, 255]]
    assert read_image(file, "RGB", "x", "").mode == "RGB"


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode != "F"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_mode_of_pillow_gives_the_greys_that_it_holds(mode, wanted):
    image = in_mode(Image.fromarray(GREY), mode)
    image.format = "PNG"  # in which older versions of Pillow call 16-bit greyscale "I"
    found = np.asarray(read_image(image, wanted)).astype(int)
    want = GREY.astype(int) if mode != "1" else 255 * (GREY > 127)
    assert found.shape == ((16, 16) if wanted == "L" else (16, 16, 3))
    difference = np.abs(found - (want if wanted == "L" else want[..., None])).max()
    assert difference <= (4 if mode == "LAB" else 1)  # its lightness has 256 steps of its own


def test_a_transparent_palette_gives_its_colours_without_a_warning(tmp_path):
    image = Image.fromarray(noise()).quantize(16)
    image.save(tmp_path / "x.png", transparency=bytes(range(16)))
    with Image.open(tmp_path / "x.png") as opened:
        assert isinstance(opened.info["transparency"], bytes)
    want = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), want)


def test_pixels_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImageError, match="32 bits; save it with 8 or 16"):
        read_image(tmp_path / "x.tif", "RGB", "x", "")


def test_all_other_images_are_read_as_timm_reads_them(tmp_path):
    """With a rotation of the camera, a palette, transparency, CMYK: to the last pixel."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    image = Image.fromarray(noise())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "train" / "a" / "turned.jpg", exif=exif)
    image.quantize(16).save(tmp_path / "train" / "a" / "palette.png")
    Image.fromarray(noise((9, 9, 4)), "RGBA").save(tmp_path / "train" / "a" / "clear.png")
    image.convert("CMYK").save(tmp_path / "train" / "a" / "print.jpg")
    image.convert("L").save(tmp_path / "train" / "a" / "grey.png")
    ours, timms = open_folder(tmp_path, TRAIN), ImageDataset(tmp_path / "train")
    for dataset in (ours, timms):
        dataset.transform = lambda picture: torch.from_numpy(np.array(picture))
    assert [path for path, _ in ours.samples] == [p for p, _ in timms.reader.samples]
    for index in range(5):
        assert torch.equal(ours[index][0], _timms(timms, index))


def _timms(dataset, index):
    """As timm's dataset reads it, and closes the file, which timm does not."""
    file, _ = dataset.reader[index]
    with file, Image.open(file) as image:
        return dataset.transform(image.convert(dataset.input_img_mode))


def test_a_picture_too_large_for_pillow_is_one_line(folder):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20000, 10000, 1, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data = struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I4s", 9, b"IDAT")
    (folder / "train" / "a" / "0.png").write_bytes(header + data)
    with pytest.raises(UnreadableImageError, match=r"0\.png: more pixels than Pillow opens"):
        check_readable(open_folder(folder, TRAIN), progress=False)


def test_a_truncated_image_is_found_before_training_and_all_are_named(folder, cache):
    files = sorted(folder.glob("train/*/1.jpg"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-300])
    train = open_folder(folder, TRAIN)
    check_readable(train, progress=False)  # their headers are whole
    with pytest.raises(UnreadableImageError) as caught:
        check_readable(train, progress=False, decode=True)
    assert all(str(file) in str(caught.value) for file in files)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG"])
def test_the_check_says_what_a_full_decoding_says(form):
    """The check decodes a JPEG at an eighth of its size."""
    buffer = io.BytesIO()
    more = {"progressive": True} if form == "progressive" else {}
    Image.fromarray(noise()).save(buffer, "PNG" if form == "PNG" else "JPEG", **more)
    whole = buffer.getvalue()
    generator = np.random.default_rng(1)
    damaged = [whole[:cut] for cut in generator.integers(1, len(whole), 40)]
    for _ in range(60):
        other = bytearray(whole)
        other[generator.integers(len(other))] ^= 1 << generator.integers(8)
        damaged.append(bytes(other))
    verdicts = []
    for content in damaged:
        fault = isinstance(inspect_image(io.BytesIO(content), decode=True), Exception)
        try:
            read_image(io.BytesIO(content), "RGB", "x", "")
            verdicts.append((fault, False))
        except UnreadableImageError:
            verdicts.append((fault, True))
    assert all(fault == full for fault, full in verdicts)
    assert {full for _, full in verdicts} == {True, False}


def test_what_was_whole_is_not_read_again_until_it_changes(folder, cache, monkeypatch):
    looked = []
    monkeypatch.setattr(
        data_module, "inspect_image", lambda *a: looked.append(a) or inspect_image(*a)
    )
    image = Image.fromarray(noise())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "train" / "a" / "0.jpg", exif=exif)
    first = check_readable(open_folder(folder, TRAIN), progress=False, decode=True)
    assert len(looked) == 6
    assert "1 images have an EXIF rotation" in first[0]
    again = check_readable(open_folder(folder, TRAIN), progress=False, decode=True)
    assert (again, len(looked)) == (first, 6)
    file = folder / "train" / "b" / "2.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UnreadableImageError, match=str(file)):
        check_readable(open_folder(folder, TRAIN), progress=False, decode=True)


def test_processes_share_the_images_and_miss_none(folder, cache):
    bad = folder / "train" / "b" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])
    train, found = open_folder(folder, TRAIN), []
    for rank in range(2):
        try:
            check_readable(train, progress=False, decode=True, share=(rank, 2))
        except UnreadableImageError:
            found.append(rank)
    assert found == [0]  # it is the fifth image


def test_a_cache_that_cannot_be_written_costs_only_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path / "file" / "cache"))
    assert check_readable(open_folder(folder, TRAIN), progress=False, decode=True) == []
