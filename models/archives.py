"""Read published weight files (.pt, .pth, .ckpt, .bin, .safetensors) without running code from them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import files
from runtime.errors import UserError, require


def read_archive(path: Path | str) -> Any:
    """The content of a weight file: tensors by name, or whatever nested plain values its trainer saved.

    Pickles are read with torch's restricted unpickler. The only classes it accepts are tensors and the argument lists
    that trainers save beside them (`argparse.Namespace`, inert).

    Raises:
        UserError: the file is missing, damaged, or asks to run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return files.load_tensors(path)
    with files.reading(path):
        open(path, "rb").close()
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _require_sound(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
    ) as error:
        # What torch's restricted unpickler says of a class that it refuses
        code = re.search(r"GLOBAL (\S+)", str(error))
        problem = (
            f"asks to run {code[1]} from outside torch, which is refused; if you trust the file, save its state dict "
            f"alone, as safetensors"
            if code
            else "is damaged or not a weight file of PyTorch; restore it from a copy"
        )
        raise UserError(f"{path} {problem}") from error


def _require_sound(path: Path) -> None:
    """Raise UserError unless a ZIP archive is what torch writes: not compressed, no overlaps, every CRC as recorded.

    This runs before anything in the file is interpreted; torch itself maps the file and checks none of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            bounds = [*(entry.header_offset for entry in entries[1:]), path.stat().st_size]
            # strictly below the next entry's start, because an entry's own header lies before its data
            sound = all(entry.header_offset + entry.file_size < end for entry, end in zip(entries, bounds, strict=True))
            # last, because it reads all that the entries declare: compressed or overlapping entries of a small file can
            # declare any amount
            damaged = archive.testzip() if sound and packed is None else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from error
    require(
        packed is None and sound,
        f"{path} is not an archive as torch writes it ({packed or 'its entries overlap'}); save the state dict anew",
    )
    require(damaged is None, f"{path} is damaged: its checksum of {damaged} does not fit; restore it from a copy")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file that holds a plain state dict and nothing else.

    Raises:
        UserError: as `read_archive`, or the file holds more than tensors by name.
    """
    tensors = tensors_of(read_archive(path))
    require(bool(tensors), f"{path} is not a plain table of tensors by name; save the state dict alone")
    return tensors


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The entries of `value` if it maps names to tensors and to nothing else; otherwise empty."""
    plain = isinstance(value, Mapping) and all(
        # dense, with data
        isinstance(name, str) and isinstance(item, Tensor) and item.layout == torch.strided and not item.is_meta
        for name, item in value.items()
    )
    return dict(value) if plain else {}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in the order of the names."""
    state = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        state.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
