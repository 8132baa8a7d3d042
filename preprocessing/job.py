"""The making of a latent set, shard by shard: what an interrupted start left on disk, and the end.

Everything that the bytes depend on is in `job.json`; a folder of shards belongs to one job. Shards are written
atomically, so those that are on disk need not be made again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.latents import LatentSpace
from models.manifest import MANIFEST, Shard
from preprocessing import shards
from runtime import files, locks
from runtime.errors import UserError, require
from runtime.options import option
from runtime.text import quoted

JOB = "job.json"
# Marks that a process of the present start met an error: the others need not go on.
STOPPED = ".stopped"


@dataclass(frozen=True, kw_only=True)
class Options:
    images: str = option(
        help="folder or ZIP file of images: class folders, or a dataset.json with labels", heading="images"
    )
    vae: str = option(
        help="autoencoder: hub id or local folder of diffusers, or 'pixels' to store the images themselves",
        heading="encoder",
    )
    resolution: int = option(within="[1, inf)", help="side of the square images, in pixels")
    out: str = option(help="folder of the latent set to write", heading="latent set")
    statistics: str | None = option(None, help="latents_stats.pt of LightningDiT: mean and std that scale the latents")
    flip: bool = option(False, help="store a second view, encoded from the mirrored image")
    keep_images: bool = option(False, help="store the cropped images too, as PNG")
    moments: bool = option(True, help="store posterior mean and std; --no-moments: one fixed sample")
    grey: bool = option(False, help="one channel instead of RGB (with --vae pixels, or an autoencoder of grey images)")
    dtype: str = option("float16", help="type of the stored latents", choices=("float16", "float32"))
    mixed_precision: str = option("no", help="precision of the encoder", choices=("no", "bf16"))
    batch_size: int = option(32, within="[1, inf)", help="images per call of the encoder")
    shard_size: int = option(4096, within="[1, inf)", help="images per file")
    workers: int | None = option(
        None, within="[0, inf)", help="decoding processes per GPU (default: the CPU cores, shared out)", heading="work"
    )
    skip_bad: int = option(0, within="[0, inf)", help="leave out up to this many unusable images instead of stopping")
    seed: int = option(0, help="seed of the fixed samples (--no-moments)")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A latent set to be made, in parts that encoding and import have in common."""

    folder: Path
    space: LatentSpace
    shape: tuple[int, ...]  # (views, parts, C, H, W) of one item
    dtype: str
    bounds: Sequence[int]  # shard s holds items bounds[s] .. bounds[s + 1] - 1
    image_channels: int  # of the kept images; 0 if images are not kept
    settings: Mapping[str, Any]  # everything that the bytes depend on, as JSON

    @property
    def shard_numbers(self) -> range:
        return range(len(self.bounds) - 1)

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.shape[-1] * self.space.stride

    def items(self, shard: int) -> range:
        """The items that belong to a shard."""
        return range(self.bounds[shard], self.bounds[shard + 1])

    def bytes_needed(self, written: Collection[int]) -> int:
        """Disk that the shards outside `written` will take, roughly: kept photographs compress to two thirds."""
        image = self.resolution**2 * self.image_channels * 2 // 3
        item = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize + image + 64
        return item * sum(len(self.items(shard)) for shard in self.shard_numbers if shard not in written)

    def conclude(
        self, entries: Mapping[int, Shard], class_names: Sequence[str], source: str, skipped: Sequence[str] = ()
    ) -> None:
        """Write the manifest from the `entries` of all shards, which are on disk."""
        from dataset import LatentSet

        views, parts, _, side, _ = self.shape
        shards.write_manifest(
            self.folder,
            space=self.space,
            resolution=self.resolution,
            latent_size=side,
            views=views,
            parts=parts,
            dtype=self.dtype,
            crop="adm",
            class_names=class_names,
            images=self.image_channels > 0,
            shards=[entries[shard] for shard in sorted(entries)],
            source=source,
            skipped=skipped,
        )
        left_out = f", {len(skipped)} images left out" if skipped else ""
        print(f"{quoted(self.folder)}: {len(LatentSet(self.folder)):,} items in {len(entries)} shards{left_out}")


def begin(job: Job, held: ExitStack) -> dict[int, Shard] | None:
    """Lock the folder for this process until `held` closes, and look at what is there.

    Returns the entries of the shards that are whole, by number, or None if the set is finished.

    Raises:
        UserError: another process writes there, the folder holds something else, the disk is too small.
    """
    from dataset import LatentSet

    folder = job.folder
    held.enter_context(locks.locked(folder, "wait for it, or choose another --out"))
    resumed = (folder / JOB).exists()
    if resumed:
        earlier = files.read_json(folder / JOB)
        if differing := [key for key in job.settings if earlier.get(key) != job.settings[key]]:
            raise UserError(
                f"{folder} holds the set of another job (it differs in {', '.join(differing)}); "
                "choose another --out, or delete the folder"
            )
    else:
        # a leftover is that of the description below, whose writer was killed
        require(
            all(path.name in (locks.LOCK, STOPPED) for path in folder.iterdir()),
            f"{folder} holds something else already (no {JOB}); choose another --out",
        )
    if (folder / MANIFEST).exists():
        shards.forget(folder)  # a kill may have come between the manifest and this
        print(f"{quoted(folder)} is finished already: {len(LatentSet(folder)):,} items")
        return None
    (folder / STOPPED).unlink(missing_ok=True)
    written = _whole_shards(job) if resumed else {}
    shards.require_space(folder, job.bytes_needed(written))
    if written:
        print(f"continuing: {len(written)} of {len(job.shard_numbers)} shards are done")
    # written last, so that a job which the checks refuse does not claim the folder
    files.write_json(folder / JOB, job.settings)
    return written


def _whole_shards(job: Job) -> dict[int, Shard]:
    """The entries of the shards on disk whose bytes are those that were written."""
    whole = {}
    for shard in job.shard_numbers:
        if (job.folder / shards.shard_name(shard)).exists():
            try:
                whole[shard] = shards.recorded(job.folder, shard)
            except UserError as error:
                print(f"{error}: making this shard anew")
    return whole
