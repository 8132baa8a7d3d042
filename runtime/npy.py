"""NumPy's .npy and .npz files from anywhere: a header is checked before its array is read, and nothing is unpickled."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from runtime import files
from runtime.errors import UserError, require

# A member that is read whole takes at most this many bytes, or this many times what it takes in its file.
LARGEST_PACKED, RATIO = 2**26, 64


class Header(NamedTuple):
    """What a .npy file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize


def header(stream: IO[bytes]) -> Header:
    """The header of an open .npy file, of which the first value is read next. Raises ValueError if it is damaged."""
    try:
        version = np.lib.format.read_magic(stream)
        parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = parse(stream)
    # NumPy reads the header as a Python literal
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"its header is no header: {error}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"it claims the shape {shape}")
    return Header(shape, dtype, fortran)


def read(stream: IO[bytes], head: Header, size: int) -> np.ndarray:
    """The array after its header, in the `size` bytes that follow. Raises ValueError if they are not its bytes."""
    if head.dtype.hasobject or head.size != size:
        raise ValueError(f"{size} bytes do not hold {head.dtype} {head.shape}")
    content = np.empty(size, np.uint8)
    if stream.readinto(content) != size:  # type: ignore[attr-defined]
        raise EOFError("it ends too early")
    return content.view(head.dtype).reshape(head.shape, order="F" if head.fortran else "C")


class NpzArchive:
    """The members of an .npz file, read one at a time. Damage raises UserError."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        files.require_plain(path)
        with self._guard(), zipfile.ZipFile(self.path) as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError) as error:
            raise UserError(
                f"{self.path} is truncated, damaged or not an .npz file ({error}); copy it again"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}; check the path") from error
        # a broken header, objects that only pickle could read, or a packing or a password that zipfile does not know
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.path} contains an object array or a broken header ({error}); save numeric arrays"
            ) from error

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], zipfile.ZipInfo]]:
        with self._guard(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            yield stream, archive.getinfo(f"{name}.npy")

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[IO[bytes], Header]]:
        """The member `name` as an open stream at its first value, with its header."""
        with self._open(name) as (stream, _):
            head = header(stream)
            if head.fortran and len(head.shape) > 1:
                raise UserError(f"{self.path}: {name} is in Fortran order; save np.ascontiguousarray of it")
            yield stream, head

    def header(self, name: str) -> Header:
        """What the member `name` is, without reading it."""
        with self._open(name) as (stream, _):
            return header(stream)

    def read(self, name: str) -> np.ndarray:
        """A whole member. Callers check its `header` first."""
        with self._open(name) as (stream, member):
            require(
                member.file_size <= max(LARGEST_PACKED, RATIO * member.compress_size),
                f"{self.path}: {name} unpacks to {member.file_size:,} bytes from {member.compress_size:,}, as no array "
                f"of numbers does; get the file again",
            )
            head = header(stream)
            return read(stream, head, member.file_size - stream.tell())
