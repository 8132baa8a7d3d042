"""Safetensors files as memory-mapped arrays: bytes are read at first use, and never from outside the file."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files
from runtime.errors import UserError, require

DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def map_shard(file: Path) -> dict[str, np.ndarray]:
    """The arrays of one safetensors file, memory-mapped read-only.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file, or its header does not match its content.
    """
    try:
        with files.reading(file, "copy or encode it again"), open(file, "rb") as handle:
            size = file.stat().st_size
            length = int.from_bytes(handle.read(8), "little")
            require(
                length <= min(size - 8, LARGEST_HEADER),
                f"{file} is truncated or not a safetensors file ({size} bytes); copy or encode it again",
            )
            return _arrays(file, size, length, json.loads(handle.read(length)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its header does not fit ({error}); copy or encode it again") from error


def will_need(array: np.ndarray, rows: Iterable[int]) -> None:
    """Let the kernel read `rows` of the mapped `array` into memory at once, all in parallel.

    Rows in random order fault one by one otherwise, each with megabytes of the kernel's read-ahead. Does nothing for an
    array that is not mapped, or where the system has no such advice.
    """
    mapping: object = array
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    for row in rows:
        begin = first + row * array.strides[0]
        start = begin - begin % mmap.PAGESIZE  # advice begins at a page
        mapping.madvise(mmap.MADV_WILLNEED, start, begin - start + array.strides[0])


def _arrays(file: Path, size: int, length: int, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that a header of `length` bytes describes.

    Raises:
        UserError: the arrays do not fill the rest of the file exactly, one after the other; the view below would
            otherwise reach outside the file, and reading there raises SIGBUS.
    """
    header.pop("__metadata__", None)
    # in the order of their bytes each array must begin where the one before ends
    ends = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        require(entry["dtype"] in DTYPES, f"{file} holds {name} as {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        sound = all(type(side) is int and side >= 0 for side in shape)
        require(
            sound and begin == ends and end - begin == prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize,
            f"{file} is damaged: its header places {name} at bytes {begin} to {end}, which does not fit; copy or "
            f"encode it again",
        )
        ends = end
    expected = 8 + length + ends
    require(size == expected, f"{file} is truncated: {size} of {expected} bytes; copy or encode it again")
    payload = np.memmap(file, np.uint8, "r").view(np.ndarray)[8 + length :]
    return {
        name: payload[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
