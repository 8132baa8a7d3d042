"""One writer per folder: a lock that says who holds it.

The lock is the kernel's (`lockf`), so it ends with its process, however that ends. Where a file system offers none, a
claim file stands in: its holder keeps it fresh, and a claim whose holder is gone is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from runtime import files
from runtime.errors import UserError

LOCK = ".lock"
CLAIM = ".lock.claim"
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
FRESH = 60.0  # seconds between two signs of life of a claim
STALE = 600.0  # seconds without one after which a claim of another machine is taken over


@contextmanager
def locked(folder: Path | str, remedy: str) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for this process alone inside the block.

    Raises:
        UserError: another process holds it (named, followed by `remedy`), or the place cannot be written.
    """
    folder = Path(folder)
    with files.writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _kernel_lock(folder, remedy) or _claimed(folder, remedy):
            yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _kernel_lock(folder: Path, remedy: str) -> AbstractContextManager | None:
    """The kernel's lock of `folder`, taken; None where its file system offers none."""
    while True:
        with files.writing(folder):
            handle = open(folder / LOCK, "a+", encoding="utf-8")
        try:
            # a lock of this process alone: decoding workers that outlive a killed encoder must not hold it
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_ino == os.stat(folder / LOCK).st_ino:
                return _held(folder, handle)
        except (BlockingIOError, PermissionError):
            with handle:
                raise _taken(folder, _holder(handle), remedy) from None
        except FileNotFoundError:  # released, and so removed, between the two calls
            pass
        except OSError as error:
            handle.close()
            if error.errno in UNSUPPORTED:
                (folder / LOCK).unlink(missing_ok=True)
                return None
            raise UserError(f"cannot lock {folder}: {error.strerror}") from error
        handle.close()


@contextmanager
def _held(folder: Path, handle: TextIO) -> Iterator[None]:
    """Sign a lock that was taken; its file goes when the block ends, while it is still held."""
    with handle:
        _sign(handle)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def me() -> dict[str, Any]:
    """This process, as others are told of it."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "process": process.pid,
        "started": round(process.create_time(), 1),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _sign(handle: TextIO) -> None:
    handle.truncate(0)
    handle.write(json.dumps(me()))
    handle.flush()


def _holder(handle: TextIO) -> dict[str, Any] | None:
    """Who has signed an open lock; None where nobody has, or not in our words."""
    handle.seek(0)
    try:
        holder = json.loads(handle.read(4096))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and {"host", "process", "since"} <= holder.keys() else None


def _taken(folder: Path, holder: dict[str, Any] | None, remedy: str) -> UserError:
    who = (
        f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        if holder
        else "it does not say which"
    )
    return UserError(f"another process is writing {folder} ({who}); {remedy}")


@contextmanager
def _claimed(folder: Path, remedy: str) -> Iterator[None]:
    """Hold the claim file of `folder`, for file systems without locks."""
    claim = folder / CLAIM
    for _ in range(2):
        try:
            with open(claim, "x", encoding="utf-8") as handle:
                _sign(handle)
            break
        except FileExistsError:
            try:
                with open(claim, encoding="utf-8") as handle:
                    holder, age = _holder(handle), time.time() - os.fstat(handle.fileno()).st_mtime
            except FileNotFoundError:
                continue
            if not _gone(holder, age):
                raise _taken(folder, holder, remedy) from None
            print(f"note: {claim} was left by a process that is gone; taken over", flush=True)
            claim.unlink(missing_ok=True)
    else:
        raise _taken(folder, None, remedy)
    ended = threading.Event()

    def keep_fresh() -> None:
        while not ended.wait(FRESH):
            os.utime(claim)

    threading.Thread(target=keep_fresh, daemon=True, name="claim").start()
    try:
        yield
    finally:
        ended.set()
        claim.unlink(missing_ok=True)


def _gone(holder: dict[str, Any] | None, age: float) -> bool:
    """Whether the holder of a claim that is `age` seconds old has ended: asked of the system on this machine, else by age."""
    if holder is None or holder["host"] != socket.gethostname():
        return age > STALE
    try:
        return abs(psutil.Process(holder["process"]).create_time() - holder.get("started", 0)) > 2
    except (psutil.NoSuchProcess, psutil.AccessDenied, TypeError, ValueError):
        return True
