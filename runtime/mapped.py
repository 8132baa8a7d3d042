"""Safetensors files as memory-mapped arrays: bytes are read at first use, and never from outside the file."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files
from runtime.errors import UserError

DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def map_shard(file: Path) -> dict[str, np.ndarray]:
    """The arrays of one safetensors file, memory-mapped read-only.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file, or its header does not match its content.
    """
    files.require_plain(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise UserError(
                    f"{file} is truncated or not a safetensors file ({size} bytes); copy or encode it again"
                )
            header = json.loads(handle.read(length))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; copy or encode it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its header is not JSON; copy or encode it again") from error
    try:
        return _arrays(file, size, length, header)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{file} is damaged: its header does not fit ({error}); copy or encode it again") from error


def _arrays(file: Path, size: int, length: int, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that a header of `length` bytes describes.

    Raises:
        UserError: the arrays do not fill the rest of the file exactly, one after the other; the view below would
            otherwise reach outside the file, and reading there raises SIGBUS.
    """
    header.pop("__metadata__", None)
    ends = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file} holds {name} as {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        sound = all(type(side) is int and side >= 0 for side in shape)
        if not sound or begin != ends or end - begin != prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize:
            raise UserError(
                f"{file} is damaged: its header places {name} at bytes {begin} to {end}, which does not fit; copy or "
                f"encode it again"
            )
        ends = end
    expected = 8 + length + ends
    if size != expected:
        raise UserError(f"{file} is truncated: {size} of {expected} bytes; copy or encode it again")
    payload = np.memmap(file, np.uint8, "r").view(np.ndarray)[8 + length :]
    return {
        name: payload[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
