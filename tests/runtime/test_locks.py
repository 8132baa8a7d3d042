"""One writer per folder: who is kept out, when a lock ends, and what happens on a file system without locks."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runtime import locks
from runtime.errors import UserError
from tests.helpers import held_elsewhere


def test_two_writers_on_one_folder_are_refused(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another process is writing")
    with held_elsewhere(tmp_path / locks.LOCK), refused, locks.locked(tmp_path, "wait"):
        pass
    with locks.locked(tmp_path, "wait"):
        pass


def test_a_worker_that_outlives_a_killed_writer_holds_no_lock(tmp_path: Path) -> None:
    """Decoding workers are forked while the lock is held; a POSIX lock stays with the parent."""
    with locks.locked(tmp_path, "wait"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locks.locked(tmp_path, "wait"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_a_note_is_printed_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with locks.locked(tmp_path / "run", "wait"), locks.locked(tmp_path / "run", "wait"):
        assert list((tmp_path / "run").iterdir()) == []
        (tmp_path / "run" / "result").touch()
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2 and notes[0] == notes[1]
    assert notes[0].startswith(f"note: the file system of {tmp_path / 'run'} has no locks, so a second command")
    assert (tmp_path / "run" / "result").exists()
    with locks.locked(tmp_path / "unused", "wait"):
        pass
    assert not (tmp_path / "unused").exists()  # it was made for the lock alone


def test_other_errors_of_the_lock_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("fcntl.lockf", stale)
    with pytest.raises(UserError, match="cannot lock .*Stale file handle"), locks.locked(tmp_path, "wait"):
        pass
