"""An encoding job: its settings, what an interrupted start of it left on disk, and its end.

The settings that the bytes depend on are kept in `job.json`; a folder of shards belongs to one job. Shards appear whole
(they are written atomically), so those that are there need not be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import dataset
from models.latents import LatentSpace
from preprocessing import shards
from preprocessing.images import ImageSet
from runtime import files, locks
from runtime.errors import UserError, require
from runtime.options import option

JOB = "job.json"
STOPPED = ".stopped"  # a process of the present start met an error: the others need not go on


@dataclass(frozen=True, kw_only=True)
class Options:
    images: str = option(
        help="folder or ZIP file of images: class folders, or a dataset.json with labels", heading="images"
    )
    vae: str = option(help="autoencoder: hub id or local folder of diffusers, or 'pixels' for none", heading="encoder")
    resolution: int = option(help="side of the square images, in pixels")
    out: str = option(help="folder of the latent set to write", heading="latent set")
    statistics: str | None = option(None, help="latents_stats.pt of LightningDiT: mean and std that scale the latents")
    flip: bool = option(False, help="store a second view, encoded from the mirrored image")
    keep_images: bool = option(False, help="store the cropped images too, as PNG")
    moments: bool = option(True, help="store posterior mean and std; --no-moments: one fixed sample")
    grey: bool = option(False, help="one channel instead of RGB (with --vae pixels)")
    dtype: str = option("float16", help="type of the stored latents", choices=("float16", "float32"))
    mixed_precision: str = option("no", help="precision of the encoder", choices=("no", "bf16"))
    batch_size: int = option(32, help="images per call of the encoder")
    shard_size: int = option(4096, help="images per file")
    workers: int | None = option(
        None, help="decoding processes per GPU (default: the CPU cores, shared out)", heading="work"
    )
    skip_bad: int = option(0, help="leave out up to this many unusable images instead of stopping")
    seed: int = option(0, help="seed of the fixed samples (--no-moments)")

    def __post_init__(self) -> None:
        require(
            min(self.resolution, self.batch_size, self.shard_size) > 0,
            "--resolution, --batch-size and --shard-size must be at least 1",
        )
        for flag, value in (("--workers", self.workers), ("--skip-bad", self.skip_bad)):
            require(value is None or value >= 0, f"{flag} {value} must not be negative")


_SETTINGS = (
    "resolution",
    "flip",
    "keep_images",
    "moments",
    "grey",
    "dtype",
    "mixed_precision",
    "batch_size",
    "shard_size",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done: everything that the bytes of the set depend on."""

    source: ImageSet
    options: Options
    space: LatentSpace
    shape: tuple[int, ...]  # (views, parts, C, H, W) of one item

    @property
    def folder(self) -> Path:
        return Path(self.options.out)

    @property
    def shard_numbers(self) -> range:
        return range(-(-len(self.source.names) // self.options.shard_size))

    def items(self, shard: int) -> range:
        """The items of the source that belong to a shard."""
        begin = shard * self.options.shard_size
        return range(begin, min(begin + self.options.shard_size, len(self.source.names)))

    def bytes_needed(self, kept: Sequence[int]) -> int:
        """Disk that the shards outside `kept` will take, about: kept photographs compress to two thirds."""
        options = self.options
        picture = options.resolution**2 * (1 if options.grey else 3) * 2 // 3 if options.keep_images else 0
        item = int(np.prod(self.shape)) * np.dtype(options.dtype).itemsize + picture + 64
        return item * sum(len(self.items(shard)) for shard in self.shard_numbers if shard not in kept)

    def settings(self) -> dict[str, Any]:
        """The settings that the bytes depend on, as JSON."""
        return {
            "format": dataset.FORMAT,
            "images": self.source.fingerprint,
            "space": self.space.to_json(),
            **{name: getattr(self.options, name) for name in _SETTINGS},
        }


class Work(Protocol):
    """What `begin` needs to know of a job."""

    folder: Path
    shard_numbers: range

    def bytes_needed(self, kept: Sequence[int]) -> int:
        """Disk that the shards outside `kept` will take."""
        ...

    def settings(self) -> dict[str, Any]:
        """The settings that the bytes depend on, as JSON."""
        ...


def begin(job: Work, held: ExitStack) -> dict[int, int] | None:
    """Take the folder for this process until `held` closes, and look at what is there.

    Returns the item count of each shard that is whole, or None where the set is finished.

    Raises:
        UserError: another process writes there, the folder holds something else, the disk is too small.
    """
    folder = job.folder
    held.enter_context(locks.locked(folder, "wait for it, or choose another --out"))
    settings, resumed = job.settings(), (folder / JOB).exists()
    if resumed:
        known = files.read_json(folder / JOB)
        if differing := [key for key in settings if known.get(key) != settings[key]]:
            raise UserError(
                f"{folder} holds the set of another job (it differs in {', '.join(differing)}); "
                "choose another --out, or delete the folder"
            )
    elif any(path.name not in (locks.LOCK, locks.CLAIM, STOPPED) for path in folder.iterdir()):
        raise UserError(f"{folder} holds something else already (no {JOB}); choose another --out")
    if (folder / dataset.MANIFEST).exists():
        print(f"{folder} is finished already: {len(dataset.LatentSet(folder)):,} items")
        return None
    files.remove_leftovers(folder)
    (folder / STOPPED).unlink(missing_ok=True)
    kept = _whole_shards(job) if resumed else {}
    shards.require_space(folder, job.bytes_needed(list(kept)))
    if kept:
        print(f"continuing: {len(kept)} of {len(job.shard_numbers)} shards are done")
    files.write_json(folder / JOB, settings)
    return kept


def _whole_shards(job: Work) -> dict[int, int]:
    kept = {}
    for shard in job.shard_numbers:
        entry = shards.recorded(job.folder, shard)
        if entry is not None and (job.folder / entry["file"]).exists():
            try:
                dataset.require_intact(job.folder, entry)
                kept[shard] = entry["count"]
            except UserError as error:
                print(f"{error}: making this shard anew")
    return kept


def finish(job: Job, entries: dict[int, dict[str, Any]]) -> None:
    """Write the manifest, now that all shards are there.

    Raises:
        UserError: more images were left out, over all starts and processes, than `skip_bad` allows.
    """
    skipped = []
    for shard, entry in entries.items():
        if entry["count"] < len(job.items(shard)):
            names = set(shards.names(job.folder / entry["file"]))
            skipped += [name for index in job.items(shard) if (name := job.source.names[index]) not in names]
    if len(skipped) > job.options.skip_bad:
        raise UserError(
            f"{len(skipped)} images cannot be used and --skip-bad allows {job.options.skip_bad}; "
            f"the first: {min(skipped)}"
        )
    views, parts, _, side, _ = job.shape
    shards.write_manifest(
        job.folder,
        space=job.space,
        resolution=job.options.resolution,
        latent_size=side,
        views=views,
        parts=parts,
        dtype=job.options.dtype,
        crop="adm",
        class_names=job.source.class_names,
        images=job.options.keep_images,
        shards=[entries[shard] for shard in sorted(entries)],
        source=job.source.description,
        skipped=sorted(skipped),
    )
    print(
        f"{job.folder}: {len(dataset.LatentSet(job.folder)):,} items in {len(entries)} shards, {len(skipped)} images left out"
    )
