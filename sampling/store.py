"""A set of samples on disk: growing while it is drawn, then `samples.npz`, `samples.json` and `grid.png`.

Drawn samples live in `partial/` until the others are written, so that a killed run continues where it was. The folder
is whole or absent: while it is there, its settings decide, and whatever else lies beside it is written again.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import files, npy
from runtime.errors import note, require
from sampling import picture

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 2
PARTIAL = "partial"
SETTINGS = "settings.json"
# The digests in samples.json beside the settings, and their files.
DIGESTS = {"samples": "samples.npz", "picture": "grid.png"}
FILES = (SETTINGS, "checks.npy", "labels.npy", "images.npy")


class Store:
    """The growing set of samples on disk: memory-mapped images, labels and a checksum for each sample.

    All processes write their own rows of one file, which the main process makes before the others open it; a restart
    under the same settings keeps the rows whose checksum fits. `shape` is (H, W, C) of an image. The caller holds the
    lock of `out` (`runtime.locks`).
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        count: int,
        shape: tuple[int, ...],
        processes: Accelerator,
        overwrite: bool = False,
    ) -> None:
        self.out, self.settings, self.count, self.shape = out, json.loads(json.dumps(settings)), count, shape
        self.processes = processes
        self.partial = out / PARTIAL
        self.layout = {
            "checks": (np.uint32, (count,)),
            "labels": (np.int64, (count,)),
            "images": (np.uint8, (count, *shape)),
        }
        from runtime.launch import on_main

        on_main(processes, lambda: self._prepare(overwrite))
        self._arrays: dict[str, np.memmap] = {}

    def _prepare(self, overwrite: bool) -> None:
        """Keep an earlier attempt under the same settings; drop one under other settings only with `overwrite`.

        Raises UserError for settings that differ, and for files that this class did not write.
        """
        if self.partial.exists():
            names = [path.name for path in self.partial.iterdir()] if self.partial.is_dir() else [PARTIAL]
            foreign = sorted(set(names) - set(FILES))
            require(
                not foreign,
                f"{self.partial} holds {', '.join(foreign[:3])}, which generate.py did not write; choose another --out",
            )
            earlier = begun(self.out)
            same = earlier == self.settings
            require(
                same or earlier is None or overwrite,
                f"{self.out} holds unfinished samples of other settings ({difference(earlier, self.settings)}); choose "
                f"another --out, or add --overwrite",
            )
            # an array that was cut short cannot be continued
            if same and all(self._whole(name) for name in self.layout):
                self._forget_damaged()
                return
            files.remove(self.partial)
        with files.replacing(self.partial) as folder:
            folder.mkdir()
            for name, (dtype, shape) in self.layout.items():
                _allocate(folder / f"{name}.npy", dtype, shape)
            files.write_json(folder / SETTINGS, self.settings)

    def _whole(self, name: str) -> bool:
        """Whether the file of an earlier attempt has the type, the shape and the size of this one's."""
        dtype, shape = self.layout[name]
        file = self.partial / f"{name}.npy"
        if file.is_file():
            with files.reading(file), suppress(ValueError), open(file, "rb") as stream:
                head = npy.header(stream)
                if head[:2] == (shape, dtype) and file.stat().st_size == stream.tell() + head.size:
                    return True
        note(f"{file} is damaged: its samples are drawn again")
        return False

    def _forget_damaged(self) -> None:
        """Mark samples whose checksum does not fit as missing."""
        images, labels, checks = (
            np.load(self.partial / f"{name}.npy", mmap_mode="r+") for name in ("images", "labels", "checks")
        )
        drawn = np.flatnonzero(checks)
        bad = [index for index in drawn if checks[index] != checksum(images[index], labels[index])]
        if bad:
            note(f"{len(bad)} of {len(drawn)} unfinished samples in {self.partial} are damaged, and drawn again")
            checks[bad] = 0
            checks.flush()

    def _open(self, name: str) -> np.memmap:
        if name not in self._arrays:
            with files.writing(self.partial):
                self._arrays[name] = np.lib.format.open_memmap(self.partial / f"{name}.npy", "r+")
        return self._arrays[name]

    def missing(self, rank: int, world: int) -> list[int]:
        """This process's share of the samples that are still to be drawn."""
        left = np.flatnonzero(self._open("checks") == 0)
        self.processes.wait_for_everyone()
        return left[rank * len(left) // world : (rank + 1) * len(left) // world].tolist()

    def put(self, indices: Sequence[int], images: np.ndarray, labels: np.ndarray) -> None:
        """Write images (n, H, W, C) uint8 and labels (n,) of the samples at `indices`."""
        with files.writing(self.partial):
            self._open("images")[indices] = images
            self._open("labels")[indices] = labels
            self._open("checks")[indices] = [
                checksum(image, label) for image, label in zip(images, labels, strict=True)
            ]

    def flush(self) -> None:
        """Push this process's rows to disk."""
        for array in self._arrays.values():
            array.flush()

    def finish(self, names: Sequence[str]) -> list[Path]:
        """Write the npz, the JSON and the grid, drop the partial files; returns what was written.

        Classes that were asked for stand in the grid in their order, all of them, on pages; of other samples it shows
        some of some classes. `names` are the classes' names.
        """
        images, labels = self._open("images"), self._open("labels")
        with (
            files.replacing(self.out / "samples.npz") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            # np.savez would copy the arrays into memory; this streams them.
            for name, array in (("arr_0", images), ("labels", labels)):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array))
        grid = self.out / DIGESTS["picture"]
        for old in self.out.glob("grid-[0-9]*.png"):  # pages of samples that these replace
            files.remove(old)
        if (asked := self.settings.get("classes")) is not None:
            pages = picture.write_groups(
                grid, [(names[label], images[places]) for label, places in picture.runs(asked)]
            )
        else:
            shown = picture.by_class(np.asarray(labels))
            rows = [np.asarray(images[places]) for _, places in shown]
            picture.write(grid, rows, [names[label] for label, _ in shown])
            pages = [grid]
        files.write_sealed(
            self.out / "samples.json",
            {
                "format": FORMAT,
                **self.settings,
                **{name: files.digest(self.out / file) for name, file in DIGESTS.items()},
            },
        )
        # last: until here the same command does all this again
        files.remove(self.partial)
        return [self.out / "samples.npz", self.out / "samples.json", *pages]


def finished(out: Path, settings: dict[str, Any], overwrite: bool = False) -> bool:
    """Whether `out` holds all samples of these settings, undamaged.

    Raises:
        UserError: without `overwrite`, for samples of other settings, damaged ones, or a samples.npz of unknown origin.
    """
    archive, record = out / "samples.npz", out / "samples.json"
    # unfinished samples are for `Store` to compare
    if overwrite or begun(out) is not None or not (archive.exists() or record.exists()):
        return False
    remedy = "choose another --out, or add --overwrite to replace them"
    require(archive.is_file() and record.is_file(), f"{out} has only one of samples.npz and samples.json; {remedy}")
    saved = read_record(record)
    require("samples" in saved, f"{record} was not written by generate.py; {remedy}")
    then = {name: value for name, value in saved.items() if name not in DIGESTS}
    now = json.loads(json.dumps(settings))
    require(then == now, f"{out} holds samples of other settings ({difference(then, now)}); {remedy}")
    require(
        files.digest(archive) == saved["samples"],
        f"{archive} is damaged: its digest differs from samples.json; {remedy}",
    )
    return True


def begun(out: Path) -> Any:
    """The settings of the unfinished samples in `out`; None without such samples, or if their settings are damaged."""
    file = out / PARTIAL / SETTINGS
    with files.reading(file), suppress(ValueError):
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return None


def read_record(path: Path) -> dict[str, Any]:
    """The settings and the digests in a samples.json, without format and seal. Raises UserError if it is damaged."""
    return {name: part for name, part in files.read_sealed(path).items() if name not in ("format", files.SEAL)}


def difference(then: Any, now: dict[str, Any]) -> str:
    """The first setting that differs, as 'seed 0, not 1', else the settings that `then` alone has."""
    then = then if isinstance(then, dict) else {}
    return next(
        (f"{name} {then.get(name)}, not {value}" for name, value in now.items() if then.get(name) != value),
        f"with {', '.join(sorted(then.keys() - now.keys()))}",
    )


def checksum(image: np.ndarray, label: int) -> int:
    """CRC-32 of one sample, all 64 bits of its label included; never 0, which marks a missing sample."""
    return zlib.crc32(np.int64(label).tobytes(), zlib.crc32(image.tobytes())) or 1


def _allocate(file: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A file of zeros whose disk space is reserved, so that a full disk is an error now and not a SIGBUS later."""
    np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
    with open(file, "r+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
