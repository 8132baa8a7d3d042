"""Image sets: labels, decoding of unusual files, and the centre crop, bit for bit."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from preprocessing.images import BadImage, ImageFiles, center_crop, cropped, decode, png
from runtime.errors import UserError
from tests.helpers import class_folders, photograph, zipped


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def cubic(x: float) -> float:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resampled(pixels: np.ndarray, size: int, kernel, radius: float) -> np.ndarray:
    """Axis 0 of uint8 `pixels` at `size` samples: a kernel stretched by the scale, in fixed point with 22 bits."""
    scale = len(pixels) / size
    stretch = max(scale, 1.0)
    rows = []
    for place in range(size):
        center = (place + 0.5) * scale
        low = max(0, int(center - radius * stretch + 0.5))
        high = min(len(pixels), int(center + radius * stretch + 0.5))
        weights = np.array([kernel((x - center + 0.5) / stretch) for x in range(low, high)])
        fixed = np.array(
            [math.floor(abs(w) * 2**22 + 0.5) * (1 if w >= 0 else -1) for w in weights / weights.sum()], np.int64
        )
        rows.append((np.tensordot(fixed, pixels[low:high].astype(np.int64), 1) + 2**21) >> 22)
    return np.clip(rows, 0, 255).astype(np.uint8)


def resized(pixels: np.ndarray, height: int, width: int, kernel, radius: float) -> np.ndarray:
    if width != pixels.shape[1]:
        pixels = resampled(pixels.transpose(1, 0, 2), width, kernel, radius).transpose(1, 0, 2)
    return resampled(pixels, height, kernel, radius) if height != pixels.shape[0] else pixels


def restated_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of guided diffusion, from its rule alone and without Pillow."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resized(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    scale = size / min(pixels.shape[:2])
    pixels = resized(pixels, round(pixels.shape[0] * scale), round(pixels.shape[1] * scale), cubic, 2.0)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@settings(max_examples=25, deadline=None)
@given(width=st.integers(5, 90), height=st.integers(5, 90), size=st.integers(4, 24), seed=st.integers(0, 9))
def test_the_crop_is_the_rule_bit_for_bit(width, height, size, seed):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), size)), restated_crop(pixels, size))


def test_the_crop_of_a_square_of_the_right_size_is_the_picture():
    picture = photograph(0, 16, 16)
    np.testing.assert_array_equal(np.asarray(center_crop(picture, 16)), np.asarray(picture))


def test_folder_zip_and_label_file_give_the_same_items(tmp_path):
    folder = class_folders(tmp_path / "set")
    by_folder, by_zip = ImageFiles(folder), ImageFiles(zipped(folder, tmp_path / "set.zip"))
    names = by_folder.names
    assert by_folder.class_names == ["n00", "n01", "n02"] and by_folder.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [[name, int(2 - int(name[2]))] for name in reversed(names)]})
    )
    by_file = ImageFiles(folder)
    assert by_file.labels.tolist() == [2] * 5 + [1] * 5 + [0] * 5 and by_file.class_names == ["0", "1", "2"]
    assert by_folder.names == by_zip.names == by_file.names and by_folder.fingerprint == by_zip.fingerprint
    assert by_file.fingerprint != by_folder.fingerprint
    for index in (0, 7, 14):
        np.testing.assert_array_equal(cropped(by_folder, index, 16), cropped(by_zip, index, 16))


def test_pictures_without_folders_are_one_class(tmp_path):
    photograph(0).save(tmp_path / "a.png")
    assert (ImageFiles(tmp_path).labels.tolist(), len(ImageFiles(tmp_path).class_names)) == ([0], 1)


def test_other_files_are_left_out_and_counted(tmp_path):
    folder = class_folders(tmp_path / "set")
    (folder / "n00" / "notes.txt").write_text("x")
    (folder / "n00" / "._0.png").write_bytes(b"x")
    (folder / ".cache").mkdir()
    images = ImageFiles(folder)
    assert images.ignored == ["n00/._0.png", "n00/notes.txt"] and len(images.names) == 15
    assert "2 other files left out" in images.summary


def test_photographs_of_other_kinds_are_counted_by_suffix_and_warned_of(tmp_path):
    folder = class_folders(tmp_path / "set", classes=1)
    for name in ("a.HEIC", "b.heic", "c.avif", ".DS_Store"):
        (folder / "n00" / name).write_bytes(b"x")
    images = ImageFiles(folder)
    assert images.photographs == ["n00/a.HEIC", "n00/b.heic", "n00/c.avif"]
    assert "warning: 2 .heic, 1 .avif left out" in images.summary and "1 other files" in images.summary
    for name in images.names:
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"holds no image .* but 2 .heic, 1 .avif: convert these"):
        ImageFiles(folder)


@pytest.mark.parametrize("place", ["pipe", "link to a device"])
def test_a_pipe_or_a_device_is_one_bad_image(tmp_path, place):
    file = tmp_path / "bad.png"
    os.mkfifo(file) if place == "pipe" else file.symlink_to("/dev/zero")
    with pytest.raises(BadImage, match="bad.png is a pipe or a device"):
        ImageFiles(tmp_path).load(0)


def test_a_picture_by_name_that_is_postscript_starts_no_program(tmp_path, monkeypatch):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "bad.png").write_bytes(content)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    with pytest.raises(BadImage, match="bad.png cannot be read"):
        ImageFiles(tmp_path).load(0)


def labels_of(folder: Path, value: object) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": value}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "n03").mkdir(), "class folder .*n03 holds no image"),
        (lambda f: photograph(0).save(f / "loose.png"), "loose.png lies beside the class folders"),
        (lambda f: labels_of(f, [["n00/0.png", 0]]), "no label for n00/1.png"),
        (lambda f: labels_of(f, [["n00/x.png", 0]]), "gives a label to n00/x.png, which is not there"),
        (lambda f: labels_of(f, [["n00/0.png", 0]] * 2), "lists n00/0.png twice"),
        (lambda f: labels_of(f, [["n00/0.png", -1]]), "n00/0.png the label -1"),
        (lambda f: labels_of(f, [["n00/0.png", 0.5]]), "n00/0.png the label 0.5"),
        (
            lambda f: labels_of(f, [[n, 0 if "n00" in n else 2] for n in ImageFiles(f).names]),
            "class 1 of .* has no image",
        ),
        (lambda f: labels_of(f, None), "is not of the form"),
        (lambda f: (f / "dataset.json").write_text("{"), "is not of the form"),
    ],
)
def test_a_set_that_disagrees_with_itself_is_one_clear_line(tmp_path, spoil, message):
    folder = class_folders(tmp_path / "set")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        ImageFiles(folder)


def test_a_missing_an_empty_and_a_broken_set_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no image folder or ZIP file at"):
        ImageFiles(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no image"):
        ImageFiles(tmp_path)
    whole = zipped(class_folders(tmp_path / "set"), tmp_path / "set.zip")
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.zip is not a folder or a whole ZIP file"):
        ImageFiles(tmp_path / "cut.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for seed in (0, 1):
            archive.writestr("a/0.png", png(np.asarray(photograph(seed))))
    with pytest.raises(UserError, match="holds a/0.png twice"):
        ImageFiles(tmp_path / "set.zip")


def saved(picture: Image.Image, kind: str = "PNG", **arguments) -> bytes:
    picture.save(buffer := io.BytesIO(), kind, **arguments)
    return buffer.getvalue()


def test_palette_cmyk_and_transparent_pictures_become_rgb():
    picture = photograph(1)
    palette = picture.quantize(16)
    np.testing.assert_array_equal(
        np.asarray(decode(saved(palette), "p").convert("RGB")), np.asarray(palette.convert("RGB"))
    )
    cmyk = picture.convert("CMYK")
    np.testing.assert_array_equal(np.asarray(decode(saved(cmyk, "TIFF"), "c").convert("RGB")), np.asarray(picture))
    clear = picture.copy()
    clear.putalpha(7)
    np.testing.assert_array_equal(np.asarray(decode(saved(clear), "a").convert("RGB")), np.asarray(picture))


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
    grey = np.asarray(decode(saved(Image.fromarray(values)), "deep"))
    np.testing.assert_array_equal(grey, np.round(values / 257))
    assert grey.dtype == np.uint8


def test_exif_rotation_is_ignored():
    picture = photograph(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    np.testing.assert_array_equal(np.asarray(decode(saved(picture, exif=exif), "turned")), np.asarray(picture))


def spoiled(kind: str) -> bytes:
    whole = saved(photograph(3))
    if kind == "animated":
        return saved(photograph(3), "GIF", save_all=True, append_images=[photograph(4)])
    if kind == "float":
        return saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    if kind == "checksum":
        return whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    return {
        "empty": b"",
        "truncated": whole[:-200],
        "text": b"this is no picture",
        "jpeg": saved(photograph(3), "JPEG")[:-300],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", r"is empty \(0 bytes\)"),
        ("truncated", "cannot be read"),
        ("jpeg", "cannot be read"),
        ("text", "cannot be read"),
        ("checksum", "cannot be read"),
        ("animated", "has 2 frames"),
        ("float", "is an image of kind F"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, kind, message):
    (tmp_path / "bad.png").write_bytes(spoiled(kind))
    with pytest.raises(BadImage, match=f"bad.png {message}"):
        ImageFiles(tmp_path).load(0)


def test_a_damaged_zip_member_is_named(tmp_path):
    photograph(0).save(tmp_path / "one.bmp")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "one.bmp", "one.bmp")
    data = bytearray((tmp_path / "set.zip").read_bytes())
    data[200:220] = bytes(20)
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(BadImage, match="set.zip/one.bmp cannot be read"):
        ImageFiles(tmp_path / "set.zip").load(0)


@pytest.mark.parametrize("grey", [False, True])
def test_png_keeps_a_crop(tmp_path, grey):
    photograph(5).save(tmp_path / "a.png")
    crop = cropped(ImageFiles(tmp_path), 0, 16, grey)
    assert crop.shape == (16, 16, 1 if grey else 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(crop)))).reshape(crop.shape), crop)
    assert b"IDAT\x78\x01" in png(crop)  # the fastest of zlib's levels


@pytest.mark.parametrize("archive", [False, True])
def test_folders_around_the_class_folders_are_refused_and_the_right_path_is_named(tmp_path, archive):
    class_folders(tmp_path / "nest" / "train", classes=3, per_class=4)
    class_folders(tmp_path / "nest" / "val", classes=3, per_class=1)
    place = zipped(tmp_path / "nest", tmp_path / "nest.zip") if archive else tmp_path / "nest"
    with pytest.raises(UserError, match=rf"train holds only folders.*probably {place / 'train'} "):
        ImageFiles(place)
    assert len(ImageFiles(tmp_path / "nest" / "train").class_names) == 3
    # one wrapper is enough, and a folder with images of its own may have folders below
    with pytest.raises(UserError, match=rf"probably {tmp_path / 'nest' / 'train'} "):
        (tmp_path / "nest" / "val").rename(tmp_path / "val")
        ImageFiles(tmp_path / "nest")
    (tmp_path / "val" / "n00" / "more").mkdir()
    photograph(9).save(tmp_path / "val" / "n00" / "more" / "9.png")
    assert ImageFiles(tmp_path / "val").labels.tolist() == [0, 0, 1, 2]
