"""One writer per folder: a lock that says who holds it.

The lock is the kernel's (`lockf`), so it ends with its process, whatever ends the process. On a file system without
locks, a note says that a second writer is not kept out.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from runtime import files
from runtime.errors import UserError, note

LOCK = ".lock"


class Taken(UserError):
    """Another process holds the folder; `holder` says which."""

    def __init__(self, folder: Path, holder: str, remedy: str) -> None:
        super().__init__(f"another process is writing {folder} ({holder}); {remedy}")
        self.holder = holder


@contextmanager
def locked(folder: Path | str, remedy: str) -> Iterator[None]:
    """Hold `folder` for this process alone inside the block; the folder is made if it does not exist.

    What killed writers left in it is removed first (`files.remove_leftovers`).

    Raises:
        Taken: another process holds it (the message names the process and ends with `remedy`).
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    with files.writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _kernel_lock(folder, remedy):
            if left := files.remove_leftovers(folder, alone=True):
                note(f"removed what a killed command left in {folder}: {', '.join(left)}")
            yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _kernel_lock(folder: Path, remedy: str) -> AbstractContextManager[None]:
    """Take the kernel's lock of `folder`; the context holds it. Does nothing on a file system without locks."""
    while True:
        with files.writing(folder):
            handle = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  # stays open while the lock is held
        try:
            # a lock of this process alone: decoding workers that outlive a killed encoder must not hold it
            taken = files.take(handle, fcntl.lockf)
            if taken is None:
                (folder / LOCK).unlink(missing_ok=True)
                note(
                    f"the file system of {folder} has no locks, so a second command that writes there is not kept out: "
                    f"run one command at a time in this folder"
                )
                handle.close()
                return nullcontext()
            if not taken:
                with handle:
                    raise Taken(folder, _holder(handle), remedy)
            # the holder before us may have removed the file since we opened it, and a lock on that file is no lock
            if os.fstat(handle.fileno()).st_ino == os.stat(folder / LOCK).st_ino:
                return _held(folder, handle)
        except FileNotFoundError:  # released, and so removed, between the two calls
            pass
        except OSError as error:
            handle.close()
            raise UserError(f"cannot lock {folder}: {error.strerror}; choose another place") from error
        handle.close()


@contextmanager
def _held(folder: Path, handle: TextIO) -> Iterator[None]:
    """Write this process into the lock it has taken; remove the file at the end, while the lock is still held."""
    with handle:
        handle.truncate(0)
        handle.write(json.dumps(this_process()))
        handle.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def this_process() -> dict[str, Any]:
    """Host, process id and time of locking, written into the lock."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(handle: TextIO) -> str:
    """The process named in an open lock; the lock may be empty, or its content no lock record."""
    handle.seek(0)
    try:
        holder = json.loads(handle.read(4096))
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "its lock does not say which process"
