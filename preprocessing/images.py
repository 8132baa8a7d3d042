"""Image sets: folders and ZIP files with labels, decoding, and the centre crop.

Labels come from `dataset.json` at the top of the set if there is one ({"labels": [["a/b.png", 3], ...]}, paths relative
to it), else from the top-level folders, numbered in the order of their sorted names; a set without folders is one
class. A set whose top-level folder holds only folders (`train/`, `val/`) is refused: that folder is not a class.

Unusual files are treated as follows:

    palette, CMYK, YCbCr, one bit   converted to RGB (or grey) by Pillow; CMYK without a colour profile
    transparency                    dropped, the colours under it stay
    16 bits per channel             scaled to 8 bits (grey: rounded v / 257; colour: the high byte, as Pillow reads it)
    floating point, Lab             refused: their range is unknown
    more than one frame             refused (GIF, APNG, WebP, TIFF pages); an MPO photograph gives its main picture
    EXIF rotation                   ignored, as ADM ignores it: pixels are taken as stored
    smaller than the resolution     scaled up, as ADM does
    empty, truncated, unreadable    refused, naming the file
    a photograph of another kind    (HEIC, AVIF, camera RAW) left out, counted by suffix and listed in the manifest
    not an image by its suffix      left out and counted; hidden files likewise
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime import files
from runtime.errors import UserError, require, shown

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
# What Pillow may take a file for, whatever its name is: the reader of PostScript would start a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
# Photographs that cannot be read.
OTHER_PHOTOGRAPHS = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
LABELS = "dataset.json"
LARGEST_LABEL = 1_000_000  # labels are below it
LARGEST_SCALED = 1 << 28  # pixels of a picture whose shorter side is scaled to the resolution: 0.8 GB
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    NotImplementedError,
    Image.DecompressionBombError,
)


class BadImage(UserError):
    """One file that cannot be used; `--skip-bad` counts these."""


class ImageSet(Protocol):
    """What the commands of this package need of an image set."""

    description: str  # goes into the manifest
    summary: str  # is printed
    names: list[str]  # of the items, in the order of the set
    labels: np.ndarray  # (n,) int64
    class_names: list[str]
    photographs: list[str]  # that cannot be read
    fingerprint: str  # changes with the names, the labels and the sizes of the files

    def load(self, index: int) -> Image.Image:
        """The picture of item `index`, as stored. Raises BadImage."""
        ...


class ImageFiles:
    """A folder or ZIP file of images.

    Raises:
        UserError: the path is missing or holds no image, a class folder is empty, a name occurs twice, or the label
            file and the images disagree.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        folders, sizes = self._list_zip() if self.path.is_file() else self._list_folder()
        self.names = sorted(name for name in sizes if _is_image(name))
        self.photographs = sorted(name for name in sizes if _is_image(name, OTHER_PHOTOGRAPHS))
        self.ignored = sorted(sizes.keys() - {*self.names, *self.photographs, LABELS})
        unread = _counts_by_suffix(self.photographs)
        require(
            bool(self.names),
            f"{self.path} holds no image ({' '.join(SUFFIXES)})"
            + (f" but {unread}: convert these to JPEG or PNG" if unread else "; check the path"),
        )
        if LABELS in sizes:
            self.labels, self.class_names = _labels_of_file(self.names, self.read(LABELS), self.path / LABELS)
        else:
            self.labels, self.class_names = _labels_of_folders(self.names, folders, self.path)
        lines = (f"{name}\t{label}\t{sizes[name]}\n" for name, label in zip(self.names, self.labels.tolist()))
        # names, labels and sizes tell two sets apart without reading the images
        self.fingerprint = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
        self.description = self.path.resolve().name
        first = shown("".join(self.ignored[:1]))
        others = f"; {len(self.ignored):,} other files left out (first: {first})" if self.ignored else ""
        self.summary = f"{self.path}: {len(self.names):,} images, {len(self.class_names):,} classes{others}"
        if unread:
            self.summary += f"\nwarning: {unread} left out, as they cannot be read: convert them to JPEG or PNG"

    def load(self, index: int) -> Image.Image:
        """The picture of item `index`, as stored. Raises BadImage."""
        name = f"{self.path}/{self.names[index]}"
        try:
            return decode(self.read(self.names[index]), name)
        except UnidentifiedImageError as error:
            raise BadImage(f"{name} cannot be read (it is not an image file, or its beginning is damaged)") from error
        except UserError as error:  # a pipe or a device too is one bad image of the set
            raise BadImage(str(error)) from error
        except _DAMAGE as error:
            raise BadImage(f"{name} cannot be read ({str(error) or type(error).__name__})") from error

    def _list_folder(self) -> tuple[set[str], dict[str, int]]:
        """Names of the top-level folders, and the size of every file by its path in the set."""
        require(self.path.is_dir(), f"there is no image folder or ZIP file at {self.path}; check the path")
        folders: set[str] = set()
        sizes: dict[str, int] = {}
        seen: dict[tuple[int, int], str] = {}
        for folder, below, names in os.walk(self.path, followlinks=True):
            # links are followed, so a link to a parent would never end
            about = os.stat(folder)
            earlier = seen.setdefault((about.st_dev, about.st_ino), folder)
            require(
                earlier == folder,
                f"{folder} is a link to {earlier}, whose images would be counted twice; remove the link",
            )
            relative = Path(folder).relative_to(self.path)
            if relative == Path("."):
                folders = {name for name in below if not name.startswith(".")}
            sizes |= {
                (relative / name).as_posix(): os.stat(os.path.join(folder, name)).st_size
                for name in names
                if os.path.exists(os.path.join(folder, name))
            }
        return folders, sizes

    def _list_zip(self) -> tuple[set[str], dict[str, int]]:
        """`_list_folder` of a ZIP file."""
        try:
            entries = self._zip().infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.path} is not a folder or a whole ZIP file ({error})") from error
        twice = _first_twice(entry.filename for entry in entries if not entry.is_dir())
        require(twice is None, f"{self.path} holds {twice} twice; give each file one name")
        locked = next((entry.filename for entry in entries if entry.flag_bits & 1), None)
        require(locked is None, f"{self.path} is encrypted (at {locked}); unpack it and give the folder")
        tops = {entry.filename.split("/")[0] for entry in entries if "/" in entry.filename}
        sizes = {entry.filename: entry.file_size for entry in entries if not entry.is_dir()}
        return {top for top in tops if not _hidden(top)}, sizes

    def _zip(self) -> zipfile.ZipFile:
        # A forked worker opens the file again: it must not share the position with its parent.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`."""
        if self.path.is_file():
            return self._zip().read(name)
        files.require_plain(self.path / name)
        return (self.path / name).read_bytes()


def _first_twice(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _counts_by_suffix(names: Iterable[str]) -> str:
    """'1,000 .heic, 3 .avif'"""
    counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def _is_image(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in suffixes and not any(map(_hidden, path.parts))


def _labels_of_folders(names: list[str], folders: set[str], where: Path) -> tuple[np.ndarray, list[str]]:
    """The labels of the images `names`, and the names of the classes: their top-level folders."""
    tops = [name.split("/")[0] for name in names]
    if empty := folders - set(tops):
        raise UserError(f"class folder {where / min(empty)} holds no image; remove it or fill it")
    if not folders:
        return np.zeros(len(names), np.int64), [where.stem]
    loose = next((name for name in names if "/" not in name), "")
    require(not loose, f"{where / loose} lies beside the class folders, without a class; move it into one")
    # train/cats/1.jpg given by the folder above `train`: the classes would be train and val
    if hollow := folders - {name.split("/")[0] for name in names if name.count("/") == 1}:
        around = Counter(str(PurePosixPath(name).parents[1]) for name in names if name.split("/")[0] in hollow)
        likely = max(sorted(around), key=around.__getitem__)
        raise UserError(
            f"{where / min(hollow)} holds only folders, and each top-level folder is a class: give the folder of the "
            f"class folders, probably {where / likely} (or name the labels in {where / LABELS})"
        )
    classes = sorted(folders)
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[top] for top in tops], np.int64), classes


def _labels_of_file(names: list[str], text: bytes, where: Path) -> tuple[np.ndarray, list[str]]:
    """The labels of the images `names` by the label file, and the names of the classes: their numbers."""
    labels = match_labels(names, text, where)
    counts = np.bincount(labels)
    require(
        bool(counts.all()),
        f"class {np.argmin(counts)} of {where} has no image; number the classes from 0 without gaps",
    )
    return labels, [str(label) for label in range(len(counts))]


def match_labels(names: list[str], text: bytes, where: Path) -> np.ndarray:
    """(n,) int64: the labels that the label file `where`, with the content `text`, gives to `names`.

    Raises:
        UserError: the file is damaged, or its items and the names differ.
    """
    try:
        pairs = json.loads(text)["labels"]
        given = dict(pairs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{where} is not of the form {{"labels": [["a/b.png", 3], ...]}}; correct or remove it'
        ) from error
    # the dict has kept the last of two labels
    twice = _first_twice(name for name, _ in pairs)
    require(twice is None, f"{where} lists {twice} twice; give each file one label")
    for name, label in given.items():
        require(
            type(label) is int and 0 <= label < LARGEST_LABEL,
            f"{where} gives {name} the label {label!r}; labels must be whole numbers from 0 to {LARGEST_LABEL - 1}",
        )
    if absent := given.keys() - set(names):
        raise UserError(f"{where} gives a label to {min(absent)}, which is not there; correct one of them")
    unlabelled = next((name for name in names if name not in given), None)
    require(unlabelled is None, f"{where} has no label for {unlabelled}; correct one of them")
    return np.array([given[name] for name in names], np.int64)


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in `data`, as stored, in a mode that Pillow converts to RGB or grey without loss of range.

    Raises:
        BadImage: the file is empty, has several frames or is of a kind whose range is unknown. Pillow's own errors for
            damaged files pass through.
    """
    if not data:
        raise BadImage(f"{name} is empty (0 bytes)")
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise BadImage(f"{name} has {picture.n_frames} frames; keep one of them")
        picture.load()
        # 16-bit grey; Pillow's own conversion clips it at 255.
        if picture.mode.startswith("I"):
            values = np.asarray(picture).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise BadImage(f"{name} has more than 16 bits per channel; convert it to 8")
            return Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if picture.mode in ("F", "LAB"):
            raise BadImage(
                f"{name} is an image of kind {picture.mode}, whose range is unknown; convert it to 8-bit RGB"
            )
        return picture.copy()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square centre of `image`, scaled to `size` pixels (the rule of Dhariwal and Nichol's ADM).

    The image is halved with a box filter while its shorter side is at least twice `size`, scaled with a bicubic filter
    until the shorter side is `size`, and cut in the middle; odd remainders go to the right and the bottom.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    factor = size / min(image.size)
    image = _resize(image, round(image.width * factor), round(image.height * factor), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    # Width first, in a call of its own. Recent Pillow chooses the order of its two passes by their cost, earlier Pillow
    # took the width first, and each pass rounds to 8 bits: two calls give the same bits with all of them.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def cropped(source: ImageSet, index: int, size: int, grey: bool = False) -> np.ndarray:
    """Item `index` of `source` as uint8 (size, size, 3), or (size, size, 1) for `grey`. Raises BadImage."""
    picture = source.load(index).convert("L" if grey else "RGB")
    if max(picture.size) * size / min(picture.size) * size > LARGEST_SCALED:
        raise BadImage(
            f"{source.names[index]} has {picture.width} x {picture.height} pixels: too narrow to be scaled to {size}; "
            f"crop it"
        )
    array = np.asarray(center_crop(picture, size))
    return array[..., None] if grey else array


def png(image: np.ndarray) -> bytes:
    """The PNG file of a uint8 (H, W, 1 or 3) image, at zlib's fastest level: a tenth larger than Pillow's."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()
