"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import files
from runtime.errors import UserError


def test_pipes_and_devices_are_not_replaced(tmp_path: Path) -> None:
    """Root would otherwise turn /dev/full into a plain file. A link stays, and its target is written."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            files.write_json(place, {})
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and files.read_json(tmp_path / "target") == [1]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for read in (files.digest, files.read_json, files.load_tensors):
        with pytest.raises(UserError, match=r"cannot read .*absent: .*; check the path"):
            read(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot read .*: Is a directory"):
        files.digest(tmp_path)
