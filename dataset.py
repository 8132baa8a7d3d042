"""Latent sets: packed latents on disk, read at memory speed in an order that is a function of (seed, step).

A latent set is a folder of `manifest.json` and `shard-00000.safetensors`, ... Each shard holds

    latents        (n, views, parts, C, H, W) float16 or float32: raw latents, before any shift and scale.
                   views 1: of the image; 2: also of the mirrored image.
                   parts 2: posterior mean and standard deviation; 1: a fixed sample, or pixels.
    labels         (n,) int64
    name_offsets   (n + 1,) int64 and name_bytes uint8, if known: the names of the items in their source.
    image_offsets  (n + 1,) int64 and image_bytes uint8, if images were kept: the cropped images as PNG.

Shards are memory-mapped: the kernel's page cache serves a set larger than memory, and a batch costs one copy per item.
There are no worker processes and no files per item. Images, if an encoder needs them, are decoded by a pool of threads.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from models.manifest import FORMAT, MANIFEST, read_manifest, read_space, require_intact
from models.pixels import is_pixels, to_uint8
from runtime import files, launch, progress
from runtime.errors import UserError, require
from runtime.mapped import map_shard, will_need
from runtime.streams import Stream
from runtime.transfer import to_device

__all__ = [
    "FORMAT",
    "MANIFEST",
    "LatentSet",
    "flips",
    "map_shard",
    "order",
    "read_manifest",
    "require_intact",
    "steps_per_epoch",
]


class LatentSet:
    """A latent set on disk.

    `len()` is the number of items; `space` the latent space; `num_classes` the number of classes, which is also the
    null label; `latent_size` H = W; `digest` the SHA-256 of the manifest, which holds the SHA-256 of every shard.

    Args:
        path: the folder that holds `manifest.json`.
        resident: where the latents live: "disk" maps the files (the kernel keeps what it can of them in memory); "ram"
            copies them into memory first; "device" onto `device`.

    Raises:
        UserError: the folder is missing, empty or unfinished, a shard is missing, truncated or disagrees with the
            manifest, a label is outside 0 .. num_classes-1, or the set does not fit in memory ("ram").
    """

    def __init__(self, path: Path | str, *, resident: str = "disk", device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.digest = files.digest(self.path / MANIFEST)
        self.space = read_space(self.path, self.manifest)
        self.num_classes: int = self.manifest["num_classes"]
        self.latent_size: int = self.manifest["latent_size"]
        self.views: int = self.manifest["views"]
        self.parts: int = self.manifest["parts"]
        self.channels: int = self.space.channels
        self.count: int = self.manifest["count"]
        # The shape of one view of one item.
        self.shape = (self.parts, self.channels, self.latent_size, self.latent_size)
        shard_files = [self.path / shard["file"] for shard in self.manifest["shards"]]
        self._shards = [map_shard(file) for file in shard_files]
        self._check()
        self.labels = np.concatenate([np.asarray(shard["labels"]) for shard in self._shards])
        self._starts = np.cumsum([0] + [len(shard["labels"]) for shard in self._shards])
        self._check_labels()
        # Row item * views + view is one view of one item.
        self._rows = [shard["latents"].reshape(-1, *self.shape) for shard in self._shards]
        self._mapped = [(file, file.stat().st_size) for file in shard_files] if resident == "disk" else []
        if resident == "ram":
            self._rows = [_into_memory(self._rows, self.path)]
        elif resident not in ("disk", "device"):
            raise UserError(f"a latent set can be resident on disk, ram or device, not {resident}")
        self._bounds = np.cumsum([0] + [len(rows) for rows in self._rows])
        self._on_device = self._copied_to(device) if resident == "device" else None

        self._checking: threading.Thread | None = None
        self._fault: str | None = None

    def __len__(self) -> int:
        return self.count

    def check_digests(self, rank: int = 0, world: int = 1) -> None:
        """Compare every `world`th shard from `rank` on with the manifest's digests, in the background."""

        def check() -> None:
            try:
                for entry in self.manifest["shards"][rank::world]:
                    require_intact(self.path, entry)
            except UserError as error:
                self._fault = str(error)

        if self._checking is not None:
            return
        self._checking = threading.Thread(target=check, daemon=True, name="digests")
        self._checking.start()

    def require_intact(self, wait: float | None = 0.0) -> None:
        """Raise UserError if `check_digests` has met a damaged shard. Waits `wait` seconds for it (None: its end)."""
        if self._checking is not None and self._checking.is_alive() and wait != 0:
            self._checking.join(wait)
        if self._fault is not None:
            raise UserError(self._fault)

    def rows(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """The raw latents and labels of `indices` (n,), each in view `views` (n,) (None: view 0).

        Returns (n, parts, C, H, W) in the stored type and (n,) int64, on the device of a set that is resident there,
        else in host memory. Use this for GPU training: float16 is half the bytes of `read`, and the GPU converts it.

        Raises:
            IndexError: an index or a view does not exist.
        """
        indices = np.asarray(indices, dtype=np.int64)
        chosen = np.zeros_like(indices) if views is None else np.asarray(views, dtype=np.int64)
        if len(indices) and not (
            indices.min() >= 0 and indices.max() < self.count and chosen.min() >= 0 and chosen.max() < self.views
        ):
            raise IndexError(f"{self.path} has {self.count} items in {self.views} view(s)")
        if self._on_device is not None:
            latents, labels = self._on_device
            item, view = (to_device(torch.from_numpy(part), latents.device) for part in (indices, chosen))
            return latents[item, view], labels[item]
        return torch.from_numpy(self._gather(indices * self.views + chosen)), torch.from_numpy(self.labels[indices])

    def read(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`rows` as NumPy arrays, the latents as float32."""
        latents, labels = self.rows(indices, views)
        return latents.float().cpu().numpy(), labels.cpu().numpy()

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """(n, parts, C, H, W) in the stored type: the given rows, a row being item x views + view."""
        shard_of = np.searchsorted(self._bounds, rows, side="right") - 1
        within = rows - self._bounds[shard_of]
        for shard in np.unique(shard_of) if self._mapped else ():
            # reading a mapping whose file was truncated would raise SIGBUS
            file, size = self._mapped[shard]
            require(
                file.exists() and file.stat().st_size >= size,
                f"{file} was cut short while it was in use; copy or encode it again",
            )
            will_need(self._rows[shard], within[shard_of == shard].tolist())
        latents = np.empty((len(rows), *self.shape), self.manifest["dtype"])
        for place, (shard, row) in enumerate(zip(shard_of.tolist(), within.tolist())):
            latents[place] = self._rows[shard][row]
        return latents

    @property
    def has_images(self) -> bool:
        """Whether `images` works: the images were kept, or the latents are pixels."""
        return self.manifest["images"] or is_pixels(self.space)

    def images(self, indices: np.ndarray | Sequence[int], views: np.ndarray | None = None) -> np.ndarray:
        """The cropped images of `indices` (n,) as uint8 (n, R, R, channels), mirrored where `views` (n,) is 1.

        In the space of pixels, the latents are the images.

        Raises:
            UserError: the set was made without images, or a stored image is damaged.
        """
        require(self.has_images, f"{self.path} holds latents without their images; encode it with --keep-images")
        if not self.manifest["images"]:
            return to_uint8(torch.from_numpy(self.read(np.asarray(indices), views)[0][:, 0])).numpy()
        stacked = np.stack(list(self._decoders.map(self._decoded, np.asarray(indices).tolist())))
        stacked = stacked if stacked.ndim == 4 else stacked[..., None]
        mirrored = np.zeros(len(stacked), bool) if views is None else np.asarray(views) == 1
        stacked[mirrored] = stacked[mirrored, :, ::-1]
        return stacked

    @functools.cached_property
    def _decoders(self) -> ThreadPoolExecutor:
        """A thread for each core of this process's share: Pillow releases the interpreter's lock while it decodes."""
        return ThreadPoolExecutor(launch.cores(), "decoder")

    def _decoded(self, index: int) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self._entry("image", index)), formats=["PNG"]) as picture:
                return np.asarray(picture)
        except (OSError, SyntaxError) as error:
            raise UserError(f"image {index} of {self.path} is damaged ({error}); run preprocessing.verify") from error

    def source_name(self, index: int) -> str | None:
        """The name of item `index` in its source; None if the set does not store names."""
        return os.fsdecode(self._entry("name", index)) if "name_bytes" in self._shards[0] else None

    def name(self, index: int) -> str:
        """The name of item `index` in messages."""
        source = self.source_name(index)
        return f"item {index}" + (f" ({source})" if source else "")

    def _entry(self, column: str, index: int) -> bytes:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets = self._shards[shard][f"{column}_offsets"]
        begin, end = offsets[index - self._starts[shard] :][:2]
        return self._shards[shard][f"{column}_bytes"][begin:end].tobytes()

    def _copied_to(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The whole set as (count, views, parts, C, H, W) in its stored type and (count,) int64, on `device`."""
        latents = torch.empty(
            (self.count, self.views, *self.shape), device=device, dtype=getattr(torch, self.manifest["dtype"])
        )
        flat = latents.view(-1, *self.shape)
        for begin, rows in zip(self._bounds, self._rows):
            # In pieces, so that host memory never holds a copy of a whole shard.
            for at in range(0, len(rows), 4096):
                piece = torch.from_numpy(np.array(rows[at : at + 4096]))
                flat[begin + at : begin + at + len(piece)].copy_(piece)
        return latents, torch.from_numpy(self.labels).to(device)

    def _check(self) -> None:
        """Raise UserError for a shard or a count that does not agree with the manifest."""
        needed = {"latents", "labels"} | ({"image_offsets", "image_bytes"} if self.manifest["images"] else set())
        # shards of another set beside this manifest would give wrong items
        for entry, shard in zip(self.manifest["shards"], self._shards):
            file, count = self.path / entry["file"], entry["count"]
            if absent := needed - shard.keys():
                raise UserError(f"{file} lacks {min(absent)}; it is not a shard of this set")
            require(
                len(shard["labels"]) == count,
                f"{file} holds {len(shard['labels'])} items, the manifest says {count}; encode it again",
            )
            expected = (count, self.views, *self.shape)
            latents, dtype = shard["latents"], self.manifest["dtype"]
            require(
                latents.shape == expected and latents.dtype == dtype,
                f"{file} holds latents {latents.shape} of {latents.dtype}, the manifest says {expected} of {dtype}; "
                f"encode it again",
            )
        total = sum(entry["count"] for entry in self.manifest["shards"])
        require(
            0 < total == self.count,
            f"{self.path / MANIFEST} says {self.count} items but its shards hold {total}; encode it again",
        )

    def _check_labels(self) -> None:
        """Raise UserError for a label beyond the classes."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(wrong):
            raise UserError(
                f"{self.name(wrong[0])} of {self.path} has label {self.labels[wrong[0]]}, outside 0.."
                f"{self.num_classes - 1} of its {self.num_classes} classes; encode it again"
            )


def steps_per_epoch(count: int, batch: int) -> int:
    """Optimiser steps in one pass over `count` items; the incomplete last batch is dropped. Raises UserError at 0."""
    require(batch <= count, f"--batch-size {batch} is larger than the data set of {count} items; lower it")
    return count // batch


def order(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """(batch,) int64: the items of global step `step`, from 0. An epoch is one permutation, cut into whole batches."""
    epoch, within = divmod(step, steps_per_epoch(count, batch))
    return _epoch(seed, epoch, count)[within * batch : (within + 1) * batch].copy()


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    return Stream(seed, "order", epoch).permutation(count)


def flips(seed: int, step: int, batch: int, views: int) -> np.ndarray:
    """(batch,) int64: the view of each item of global step `step`; all 0 if the set has one view."""
    return np.zeros(batch, np.int64) if views == 1 else Stream(seed, "flip", step).integers(views, batch)


def _into_memory(shards: list[np.ndarray], path: Path) -> np.ndarray:
    """The rows of all shards, copied. Raises UserError if they do not fit into the free memory."""
    needed, free = sum(shard.nbytes for shard in shards), psutil.virtual_memory().available
    require(
        needed <= free,
        f"{path} takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; leave it on disk",
    )
    rows = np.empty((sum(map(len, shards)), *shards[0].shape[1:]), shards[0].dtype)
    at = 0
    for shard in progress.bar(shards, desc="reading into memory", unit="shard", main=len(shards) > 1):
        rows[at : at + len(shard)] = shard
        at += len(shard)
    return rows
