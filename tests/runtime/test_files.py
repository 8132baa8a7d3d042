"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from runtime import files
from runtime.errors import UserError
from runtime.locks import locked
from tests.helpers import killed_writer


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


def test_writers_with_one_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers have two processes 1. The folder is that of one of them, never a mixture."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    place = tmp_path / "set"
    with files.replacing(place, lambda _: True) as first, files.replacing(place) as second:
        for folder in (first, second):
            folder.mkdir()
            (folder / folder.parent.name).touch()
        assert files.remove_leftovers(tmp_path, alone=True) == []
    assert [path.name for path in place.iterdir()] == [first.parent.name]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [killed_writer(tmp_path / name) for name in ("a.json", "a.json", "b.json")]
    (tmp_path / ".a.json.somebody.tmp").mkdir()
    (tmp_path / ".a.json.somebody.tmp" / "thesis.tex").touch()
    files.write_json(tmp_path / "a.json", [1])
    assert [path.exists() for path in left] == [False, False, True]
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
        assert files.remove_leftovers(tmp_path) == []  # nobody can know whether it is at work
        files.write_json(tmp_path / "b.json", [2])
        assert left[2].exists() and files.read_json(tmp_path / "b.json") == [2]
        assert files.remove_leftovers(tmp_path, alone=True) == [left[2].name]
    killed_writer(tmp_path / "c.json")
    with locked(tmp_path, "wait"):
        pass
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.json", "b.json", ".a.json.somebody.tmp"}


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two renames fails: the folder that was there is put back."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "whole").touch()
    rename, calls = os.replace, []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with (
        pytest.raises(UserError, match="cannot write .*Input/output"),
        files.replacing(tmp_path / "set", lambda _: True) as folder,
    ):
        folder.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "whole"] and len(calls) == 3
