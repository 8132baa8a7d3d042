"""Files that are either whole or absent: atomic writes, digests, JSON and safetensors with clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError, note, require

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
SEAL = "seal"


@contextmanager
def replacing(path: Path | str, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path` in one step, on failure it is gone.

    The block may write a file or make a folder there. A folder takes the place of nothing, of an empty folder, or of one
    that `ours` recognises. Raises UserError where the place cannot be written (a path under a file, no permission, a full
    disk, a size limit), naming the path.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    require(path.name != "", f"{path} is the root of all folders: choose another place")
    require_plain(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    before = path.with_name(f".{path.name}.before.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask leaves of 0666; safetensors would give 0600
            temporary.unlink()
            yield temporary
            _flush(temporary, mode)
            if temporary.is_dir():
                require_replaceable(path, ours)
                if path.exists():
                    os.replace(path, before)
            os.replace(temporary, path)
            _flush_names(path.parent)
    finally:
        _remove(temporary)
        if before.exists() and not path.exists():
            os.replace(before, path)
        _remove(before)


def require_plain(path: Path | str) -> None:
    """Raise UserError where `path` is a pipe, a socket or a device: reading it may never end, and writing would replace it."""
    with suppress(OSError):
        mode = os.stat(path).st_mode
        require(
            stat.S_ISREG(mode) or stat.S_ISDIR(mode), f"{path} is a pipe or a device: give the path of a plain file"
        )


def require_not_read(out: Path | str, read: Iterable[Path | str]) -> None:
    """Raise UserError where `out`, which is to be written, is one of what is `read`."""
    require(
        Path(out).resolve() not in {Path(source).resolve() for source in read},
        f"--out {out} is read by this command: give another name",
    )


def require_replaceable(
    path: Path | str, ours: Callable[[Path], bool] | None = None, remedy: str = "choose another place"
) -> None:
    """Raise UserError unless a folder may take the place of `path`: nothing, an empty folder, or one that `ours` recognises."""
    path = Path(os.path.abspath(path))
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (ours is not None and ours(path)))):
        return
    raise UserError(f"{path} exists and is not what this command wrote there: {remedy}")


def remove_leftovers(folder: Path | str) -> list[str]:
    """Remove what killed writers left half-written in `folder`, by the names that `replacing` gives; returns the names.

    Only for who holds the folder (`runtime.locks`): a writer at work has such files too.
    """
    left = [path for path in Path(folder).glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        _remove(path)
    return sorted(path.name for path in left)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into a UserError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        if not isinstance(error, SafetensorError) and "inline_container" not in str(
            error
        ):  # the latter is torch.save's
            raise
        raise UserError(f"cannot write {path}: {error}; free some space or choose another place") from error


def _flush(path: Path, mode: int) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(mode)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def remove(path: Path) -> None:
    """Remove a folder as one step: no half of it is ever seen under its name."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        os.replace(path, doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _flush_names(folder: Path) -> None:
    """Push a folder's entries to disk, so that a new name outlives a power cut; not every file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises UserError where it cannot be read, or is a folder."""
    require_plain(path)
    try:
        with open(path, "rb") as handle:
            return (
                hashlib.file_digest(handle, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest(handle)
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path, or restore it from a copy") from error


def _digest(handle: Any) -> str:
    state = hashlib.sha256()
    while block := handle.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read JSON. Raises UserError where the file is missing or broken."""
    require_plain(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path, or restore it from a copy") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged: restore it from a copy") from error


def seal(value: dict[str, Any]) -> str:
    """SHA-256 over the content of a JSON object without its own seal, whatever its layout on disk."""
    content = {key: part for key, part in value.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Write a JSON object together with its seal, so that a change of any value is seen when it is read."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, SEAL: seal(plain)})


def require_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Raise UserError unless `value`, read from `path`, is what was written there."""
    if value.get(SEAL) != seal(value):
        raise UserError(
            f"{path} was damaged or edited since it was written: its seal does not fit its content; restore it, or "
            f"accept an edit with: python -m runtime.seal {path}"
        )


def require_sealed_since_2(path: Path | str, value: dict[str, Any]) -> None:
    """`require_sealed` for a file that had no seal in format 1, which is read with a note."""
    if value["format"] == 1:
        note(
            f"{Path(path).parent} is of format 1: its {Path(path).name} has no seal, so that damage in it would not be seen"
        )
    else:
        require_sealed(path, value)


def save_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically; each is made contiguous and moved to the CPU."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError where it is missing, truncated or not a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_plain(path)
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; check the path, or restore it from a copy"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); restore it from a copy") from error


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
