"""Files that are either whole or absent: atomic writes, digests, JSON and safetensors with clear errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runtime.errors import UserError, require

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "seal"
# Parts of a folder in which `replacing` works: what is written, what it replaces, and the lock of the writer.
_NEW, _OLD, _LOCK = "new", "old", "lock"
# What lockf and flock answer on a file system without locks.
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Unreadable(UserError):
    """The operating system could not read a file, whose content may well be whole."""


@contextmanager
def replacing(path: Path | str, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary path near `path`; on success it replaces `path` in one step, on failure it is removed.

    The block may write a file or make a folder there. A folder may replace an empty folder, or one that `ours`
    recognises; it never replaces anything else. What a killed writer of `path` left is removed first.

    Raises:
        UserError: the path cannot be written (it lies under a file, permission is missing, the disk is full).
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    require(path.name != "", f"{path} is the root of the file system: choose another place")
    require_plain(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path) as (folder, mode):
            temporary = folder / _NEW
            yield temporary
            _flush(temporary, mode)
            try:
                if temporary.is_dir():
                    require_replaceable(path, ours)
                    if path.exists():
                        os.replace(path, folder / _OLD)
                os.replace(temporary, path)
            finally:
                if (folder / _OLD).exists() and not path.exists():
                    os.replace(folder / _OLD, path)
            _flush_names(path.parent)


@contextmanager
def scratch(path: Path) -> Iterator[tuple[Path, int]]:
    """A folder beside `path` for this writer alone, and the mode of new files; it is removed at the end.

    Its random name is unique where process numbers are not (containers). After a kill, its lock tells everybody else
    that nobody writes there any more.
    """
    remove_leftovers(path.parent, path.name)
    handle = None
    while handle is None:
        folder = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        # until it is locked, another process may take it for a leftover and remove it
        with suppress(FileNotFoundError):
            handle = open(folder / _LOCK, "w")  # noqa: SIM115  # stays open while the lock is held
            if take(handle, fcntl.flock) is False or not (folder / _LOCK).exists():
                handle.close()
                handle = None
    try:
        # what the umask leaves of 0666; safetensors would give 0600
        yield folder, os.fstat(handle.fileno()).st_mode
    finally:
        handle.close()
        _remove_scratch(folder)


def _remove_scratch(folder: Path) -> None:
    """Remove a folder of `scratch` as far as that is possible; its lock comes last, which marks it as one."""
    with suppress(OSError):
        for part in sorted(folder.iterdir(), key=lambda part: part.name == _LOCK):
            _remove(part)
        folder.rmdir()


def take(handle: TextIO, call: Callable[[TextIO, int], None]) -> bool | None:
    """Take the kernel's lock of an open file by `call` (lockf, flock), which holds until it is closed.

    Returns False if somebody else holds it, None on a file system without locks.
    """
    try:
        call(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None


def require_plain(path: Path | str) -> None:
    """Raise UserError if `path` is a pipe, a socket or a device: a read might never end, a write would replace it."""
    with suppress(OSError):
        mode = os.stat(path).st_mode
        require(
            stat.S_ISREG(mode) or stat.S_ISDIR(mode), f"{path} is a pipe or a device: give the path of a plain file"
        )


def require_not_read(out: Path | str, read: Iterable[Path | str]) -> None:
    """Raise UserError if a command would overwrite (`out`) one of the files that it reads (`read`)."""
    require(
        Path(out).resolve() not in {Path(source).resolve() for source in read},
        f"--out {out} is read by this command: give another name",
    )


def require_replaceable(
    path: Path | str, ours: Callable[[Path], bool] | None = None, remedy: str = "choose another place"
) -> None:
    """Raise UserError unless `path` is free, an empty folder, or a folder that `ours` recognises."""
    path = Path(os.path.abspath(path))
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (ours is not None and ours(path)))):
        return
    raise UserError(f"{path} exists and is not what this command wrote there: {remedy}")


def remove_leftovers(folder: Path | str, name: str | None = None, alone: bool = False) -> list[str]:
    """Remove what killed writers of `name` (None: of anything) left in `folder`; returns the names of it.

    The folder of a writer at work is locked and stays. Where the file system has no locks, nobody can know, and only
    `alone` removes: the caller is the only one who writes in `folder`.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}\.tmp")
    left = []
    for path in sorted(path for path in Path(folder).glob(".*.tmp") if pattern.fullmatch(path.name)):
        try:
            with open(path / _LOCK, "r+") as handle:
                taken = take(handle, fcntl.flock)
                if taken or (taken is None and alone):
                    _remove_scratch(path)
                    left.append(path.name)
        except OSError:  # killed before it was locked; what is not empty, or no folder, is somebody else's
            with suppress(OSError):
                path.rmdir()
    return left


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's errors inside the block into a UserError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError, which is recognised by the name of its source file.
        if not isinstance(error, SafetensorError) and "inline_container" not in str(error):
            raise
        raise UserError(f"cannot write {path}: {error}; free some space or choose another place") from error


@contextmanager
def reading(path: Path | str, remedy: str = "check the path, or restore it from a copy") -> Iterator[None]:
    """Turn the operating system's errors inside the block into an Unreadable that names `path` and `remedy`."""
    require_plain(path)
    try:
        yield
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror or error}; {remedy}") from error


def _flush(path: Path, mode: int) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(mode)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def remove(path: Path) -> None:
    """Remove a folder in one step: a reader sees the whole folder or nothing under its name."""
    with writing(path), scratch(path) as (folder, _):
        os.replace(path, folder / _OLD)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _flush_names(folder: Path) -> None:
    """Push a folder's entries to disk, so that a new name survives a power cut, if the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises UserError if it is a folder or cannot be read."""
    state = hashlib.sha256()
    with reading(path), open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read JSON. Raises UserError if the file is missing or broken."""
    try:
        with reading(path):
            return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged: restore it from a copy") from error


def seal(value: dict[str, Any]) -> str:
    """SHA-256 over the content of a JSON object without its own seal, whatever its layout on disk."""
    content = {key: part for key, part in value.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Write a JSON object together with its seal, so that a reader notices a change of any value."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, SEAL: seal(plain)})


def read_sealed(path: Path | str) -> Any:
    """The JSON object that `write_sealed` wrote. Raises UserError if the file is missing, broken or changed."""
    value = read_json(path)
    require(isinstance(value, dict), f"{path} holds no JSON object; restore it from a copy")
    require_sealed(path, value)
    return value


def require_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Raise UserError unless `value`, read from `path`, is what was written there."""
    if value.get(SEAL) != seal(value):
        raise UserError(
            f"{path} was damaged or edited since it was written: its seal does not fit its content; restore it, or "
            f"accept an edit with: python -m runtime.seal {path}"
        )


def save_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically; each is made contiguous and moved to the CPU."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError if it is missing, truncated or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with reading(path):
            return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); restore it from a copy") from error
