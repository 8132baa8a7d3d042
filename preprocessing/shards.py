"""Writing latent sets: shard by shard, each whole or absent, and the manifest last, so that a set with one is whole.

The format is described in `dataset.py`.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.latents import LatentSpace
from models.manifest import FORMAT, MANIFEST, Shard, require_intact
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.mapped import map_shard


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    latents: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
    images: Sequence[bytes] | None = None,
) -> Shard:
    """Write one shard atomically and return its entry of the manifest.

    Args:
        latents: (n, views, parts, C, H, W) float16 or float32, raw.
        labels: (n,) integers.
        names: the n names of the items in their source.
        images: n PNG files, if images are kept.

    Raises:
        UserError: a latent is not finite, or the place cannot be written.
    """
    import torch

    file = folder / shard_name(number)
    finite = np.isfinite(latents).all(axis=tuple(range(1, latents.ndim)))
    if not finite.all():
        first = int(np.argmin(finite))
        which = names[first] if names else f"item {first} of {file}"
        raise UserError(
            f"{which} has a latent that is not finite in {latents.dtype}; if the images are sound, use --dtype float32"
        )
    # strings and PNG files are one array of bytes with offsets: safetensors holds arrays alone, and a map can slice it
    tensors = {"latents": torch.from_numpy(latents), "labels": torch.from_numpy(labels.astype(np.int64))}
    columns = {"image": images, "name": None if names is None else [os.fsencode(name) for name in names]}
    for column, items in columns.items():
        if items is not None:
            tensors[f"{column}_offsets"] = torch.from_numpy(
                np.cumsum([0] + [len(item) for item in items], dtype=np.int64)
            )
            tensors[f"{column}_bytes"] = torch.from_numpy(np.frombuffer(b"".join(items), np.uint8).copy())
    files.save_tensors(file, tensors)
    # a job that was killed keeps the shards that have such a record
    written: Shard = {"file": file.name, "count": len(latents), "sha256": files.digest(file)}
    files.write_json(_record(folder, number), written)
    return written


def recorded(folder: Path, number: int) -> Shard:
    """The entry of a shard, as recorded when it was written. Raises UserError unless its bytes are still the same."""
    entry = schema.read(Shard, _record(folder, number))
    require_intact(folder, entry)
    return entry


def _record(folder: Path, number: int) -> Path:
    return folder / f".{shard_name(number)}.json"


def write_manifest(
    folder: Path,
    *,
    space: LatentSpace,
    resolution: int,
    latent_size: int,
    views: int,
    parts: int,
    dtype: str,
    crop: str,
    class_names: Sequence[str],
    images: bool,
    shards: Sequence[Mapping[str, Any]],
    source: str,
    skipped: Sequence[str] = (),
) -> None:
    """Write `manifest.json`, which makes the folder a latent set. All shards must be on disk."""
    files.write_sealed(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "space": space.to_json(),
            "resolution": resolution,
            "latent_size": latent_size,
            "views": views,
            "parts": parts,
            "dtype": dtype,
            "crop": crop,
            "range": [-1, 1],
            "num_classes": len(class_names),
            "class_names": list(class_names),
            "count": sum(shard["count"] for shard in shards),
            "images": images,
            "shards": list(shards),
            "source": source,
            "skipped": list(skipped),
        },
    )
    forget(folder)


def forget(folder: Path) -> None:
    """Remove the records of single shards, which the manifest of the finished set holds."""
    for file in folder.glob(".shard-*.json"):
        file.unlink(missing_ok=True)


def names(file: Path) -> list[str]:
    """The names of the items of a shard."""
    shard = map_shard(file)
    text, ends = shard["name_bytes"].tobytes(), shard["name_offsets"].tolist()
    return [os.fsdecode(text[begin:end]) for begin, end in itertools.pairwise(ends)]


def require_space(folder: Path, needed: int) -> None:
    """Print the disk space needed and free. Raises UserError if there is too little."""
    free = shutil.disk_usage(folder).free
    print(f"disk: {_gib(needed)} needed, {_gib(free)} free at {folder}")
    require(
        needed <= free,
        f"{folder} needs {_gib(needed)} and has {_gib(free)} free; free some space or choose another --out",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
