"""Where images come from: an .npz file, a folder or arrays, all read as uint8 (n, H, W, C) batches.

Nothing here needs the whole set in memory: an .npz member is read through its zip stream.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

import files
from errors import UserError


class Images(Protocol):
    """A set of images that can be read in order, any part of it."""

    name: str
    shape: tuple[int, int, int]  # H, W, C
    labels: np.ndarray | None  # (N,) int64

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """SHA-256 over the whole set."""
        ...

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, C), n <= size, images start .. stop - 1 in order."""
        ...


class ArrayImages:
    """Images that are in memory already: uint8 (N, H, W, C) and perhaps labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, name: str = "arrays") -> None:
        check(name, images.shape, images.dtype)
        self.name, self.shape = name, tuple(images.shape[1:])
        self._images, self.labels = images, _checked_labels(name, labels, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._images)).hexdigest()

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            yield self._images[first : min(first + size, stop)]


class NpzImages:
    """The `arr_0` (and `labels`) of an .npz file, ADM's convention for samples and references."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        archive = NpzArchive(path)
        if "arr_0" not in archive.names:
            raise UserError(f"{path} holds no arr_0 (it holds {', '.join(sorted(archive.names)) or 'nothing'}); "
                            "the images belong there, uint8 (N, H, W, C)")
        shape, dtype = archive.layout("arr_0")
        check(str(path), shape, dtype)
        self._archive, self._count, self.shape = archive, shape[0], tuple(shape[1:])
        labels = archive.read("labels") if "labels" in archive.names else None
        self.labels = _checked_labels(str(path), labels, self._count)

    def __len__(self) -> int:
        return self._count

    def digest(self) -> str:
        return files.digest(self.path)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        stride = int(np.prod(self.shape))
        with self._archive.stream("arr_0") as (stream, _, _):
            stream.seek(start * stride, 1)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = stream.read(count * stride)
                if len(data) < count * stride:
                    raise UserError(f"{self.path} ends within image {first + len(data) // stride}; copy it again")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *self.shape)


class NpzArchive:
    """The members of an .npz file, read one at a time; every sign of damage is a UserError. Nothing is unpickled."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self._guard(), zipfile.ZipFile(self.path) as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.path} is truncated, damaged or no .npz file ({error}); copy it again") from error
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        except ValueError as error:  # NumPy's word for a broken header, or for objects that only pickle could read
            raise UserError(f"{self.path} holds no plain array where one belongs ({error})") from error

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The member `name` as an open stream behind its header, with its shape and dtype."""
        with self._guard(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            if fortran and len(shape) > 1:
                raise UserError(f"{self.path}: {name} is in Fortran order; save np.ascontiguousarray of it")
            yield stream, shape, dtype

    def layout(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a member, without reading it."""
        with self.stream(name) as (_, shape, dtype):
            return shape, dtype

    def read(self, name: str) -> np.ndarray:
        """A whole member."""
        with self._guard(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def check(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse, in one line, an array that is not uint8 (N, H, W, C) with C 1 or 3."""
    if dtype != np.uint8:
        raise UserError(f"{name}: images are {dtype}, not uint8; write values 0..255 as uint8 (N, H, W, C)")
    if len(shape) != 4:
        raise UserError(f"{name}: images have shape {tuple(shape)}, not (N, H, W, C)")
    if shape[3] not in (1, 3):
        remedy = "; it looks like (N, C, H, W), transpose it" if shape[1] in (1, 3) else ""
        raise UserError(f"{name}: images have shape {tuple(shape)}, whose last axis is not 1 or 3 channels{remedy}")
    if shape[0] == 0:
        raise UserError(f"{name} holds no images")


def _checked_labels(name: str, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{name}: labels are {labels.dtype} {labels.shape}, not integers ({count},), one per image")
    return labels.astype(np.int64)
