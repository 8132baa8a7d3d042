"""A set of samples on disk: growing while it is drawn, then `samples.npz`, `samples.json` and `grid.png`.

Finished samples live in `partial/` until all are there, so that a killed run continues where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files
from sampling import picture


class Store:
    """The growing set of samples on disk: memory-mapped images, labels and a flag for each sample.

    All processes write their own rows of one file, which the main process makes before the others look; a restart under
    the same settings keeps the finished rows. `shape` is (H, W, C) of an image.
    """

    def __init__(self, out: Path, settings: dict[str, Any], count: int, shape: tuple[int, ...], main: bool,
                 barrier: Callable[[], None]) -> None:
        self.out, self.settings, self.count, self.shape, self.barrier, self.main = out, settings, count, shape, barrier, main
        self.partial = out / "partial"
        if main:
            self._prepare()
        barrier()
        self._arrays: dict[str, np.ndarray] = {}

    def _prepare(self) -> None:
        """Keep an earlier attempt under the same settings, drop any other."""
        mark = self.partial / "settings.json"
        if mark.is_file() and files.read_json(mark) == self.settings:
            return
        with files.writing(self.out):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            _allocate(self.partial / "done.npy", np.uint8, (self.count,))
            _allocate(self.partial / "labels.npy", np.int64, (self.count,))
            _allocate(self.partial / "images.npy", np.uint8, (self.count, *self.shape))
        files.write_json(mark, self.settings)

    def _open(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.lib.format.open_memmap(self.partial / f"{name}.npy", "r+")
        return self._arrays[name]

    def missing(self, rank: int, world: int) -> list[int]:
        """This process's share of the samples that are not there yet."""
        left = np.flatnonzero(self._open("done") == 0)
        self.barrier()
        return left[rank * len(left) // world : (rank + 1) * len(left) // world].tolist()

    def put(self, indices: Sequence[int], images: np.ndarray, labels: np.ndarray) -> None:
        """Keep images (n, H, W, C) uint8 and labels (n,) of the samples at `indices`."""
        with files.writing(self.partial):
            self._open("images")[indices] = images
            self._open("labels")[indices] = labels
            self._open("done")[indices] = 1

    def flush(self) -> None:
        """Push this process's rows to disk."""
        for array in self._arrays.values():
            array.flush()

    def finish(self, names: Sequence[str]) -> None:
        """Write the npz, the JSON and the grid, whose rows are classes with their `names`, and drop the partial files."""
        images, labels = self._open("images"), self._open("labels")
        with files.replacing(self.out / "samples.npz") as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for name, array in (("arr_0", images), ("labels", labels)):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # streamed: no copy in memory
                        np.lib.format.write_array(member, np.asanyarray(array))
        shown = picture.by_class(np.asarray(labels))
        picture.write(self.out / "grid.png", [np.asarray(images[places]) for _, places in shown], [names[label] for label, _ in shown])
        files.write_json(self.out / "samples.json", {**self.settings, "samples": files.digest(self.out / "samples.npz")})
        shutil.rmtree(self.partial)


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds all samples of these settings."""
    if not ((out / "samples.json").is_file() and (out / "samples.npz").is_file()):
        return False
    saved = files.read_json(out / "samples.json")
    return {name: value for name, value in saved.items() if name != "samples"} == json.loads(json.dumps(settings))


def _allocate(file: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A file of zeros whose space is taken at once: a full disk is an error here, not a crash while it is written."""
    np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
    with open(file, "r+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
