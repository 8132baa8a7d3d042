"""Files that are either whole or absent: atomic writes, digests, JSON and safetensors with clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path` in one step, on failure it is gone.

    The block may write a file or make a folder there. Raises UserError where the place cannot be written (a path under
    a file, no permission, a full disk, a size limit), naming the path.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
                require_replaceable(path)
                _remove(path)
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def require_replaceable(path: Path | str) -> None:
    """Raise UserError unless a folder of ours may take the place of `path`: nothing, an empty folder, or one like it.

    A folder like it holds a config.json that says checkpoint or names a VAE; whatever else lies there is the user's.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        return
    config = path / "config.json"
    if path.is_dir() and (not any(path.iterdir()) or (config.is_file() and _is_ours(config))):
        return
    raise UserError(f"{path} exists and is not a checkpoint to replace: choose another place")


def _is_ours(config: Path) -> bool:
    content = read_json(config)
    return isinstance(content, dict) and (content.get("kind") == "checkpoint" or content.get("_class_name") == "AutoencoderKL")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into a UserError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place") from error
    except SafetensorError as error:
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


def digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


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
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged") from error


def save_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically; each is made contiguous and moved to the CPU."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError where it is missing, truncated or not a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); restore it from a copy") from error


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
