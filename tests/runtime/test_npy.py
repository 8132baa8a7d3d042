"""Archives from anywhere: headers are checked before arrays are read, damage is one line, and nothing is unpickled."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from evaluations.images import NpzImages
from runtime import npy
from runtime.errors import UserError


def packed(file: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file


def npy_file(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("array", [np.zeros((3, 4), order="F"), np.arange(5, dtype=">i8"), np.array("text")])
def test_arrays_are_those_that_numpy_reads(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=array)
    archive = npy.NpzArchive(tmp_path / "a.npz")
    assert archive.header("x")[:2] == (array.shape, array.dtype)
    assert np.array_equal(archive.read("x"), array) and archive.read("x").flags.writeable


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, bomb = npy_file(np.zeros((9, 2, 2, 1), np.uint8)), npy_file(np.zeros(2**22))
    file = packed(tmp_path / "bomb.npz", arr_0=images, labels=bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"labels are float64 .4194304,., not integers .9,."):
        NpzImages(file)
    monkeypatch.setattr(npy, "LARGEST_PACKED", 2**20)
    with pytest.raises(UserError, match="labels unpacks to 33,554,560 bytes"):
        npy.NpzArchive(file).read("labels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_every_damage_of_a_header_is_one_line(tmp_path: Path) -> None:
    """An open bracket is NumPy's tokenize.TokenError, an open string its SyntaxError."""
    sound = npy_file(np.arange(3))
    messages = []
    for place in range(sound.index(b"}") + 1):
        for byte in b'\x00("x9-\n':
            damaged = sound[:place] + bytes([byte]) + sound[place + 1 :]
            # what is still a header is read; an error of any other class fails here
            try:
                npy.NpzArchive(packed(tmp_path / "x.npz", x=damaged)).read("x")
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 300 and not [text for text in messages if "x.npz" not in text or "\n" in text]


@pytest.mark.parametrize("label", [2**40, -1, 2**63])
def test_labels_are_checked_in_full(tmp_path: Path, label: int) -> None:
    np.savez(
        tmp_path / "x.npz",
        arr_0=np.zeros((2, 2, 2, 1), np.uint8),
        labels=np.array([0, label], np.uint64 if label > 0 else np.int64),
    )
    with pytest.raises(UserError, match=f"labels are .*{label}|{label} to"):
        NpzImages(tmp_path / "x.npz")
