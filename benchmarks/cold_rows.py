"""Milliseconds and megabytes to read a batch of random latents that are not in memory, with and without advice.

    python -m benchmarks.cold_rows --out benchmarks/results/cold-rows.json

Before each reading the file leaves the page cache. Both ways take turns; "warm" reads the same rows again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import dataset
from benchmarks import measure
from dataset import LatentSet
from runtime import errors
from runtime.options import option


@dataclass(frozen=True, kw_only=True)
class ColdRowsConfig:
    items: int = option(40_000, help="latents of 4 x 32 x 32 with their deviations, 16 KiB each")
    batch_size: int = option(256, help="rows of a batch")
    repetitions: int = option(5, help="repetitions")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("cold_rows", ColdRowsConfig, argv, __doc__, rows, report)


def rows(config: ColdRowsConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The rows that are not known yet."""
    if known:
        return
    data = measure.latent_set(folder / "data", channels=4, side=32, classes=10, items=config.items)
    names = ("advised", "page by page", "warm")
    times: dict[str, list[float]] = {name: [] for name in names}
    megabytes: dict[str, list[float]] = {name: [] for name in names}

    def read(name: str, latents: LatentSet, index: np.ndarray) -> None:
        before, started = bytes_read(), time.perf_counter()
        latents.rows(index)
        times[name].append((time.perf_counter() - started) * 1e3)
        megabytes[name].append((bytes_read() - before) / 1e6)

    for repetition in range(config.repetitions):
        index = np.random.default_rng(repetition).choice(config.items, config.batch_size, replace=False)
        for name in ("advised", "page by page"):
            latents = evicted(data)
            advice = nullcontext() if name == "advised" else mock.patch.object(dataset, "will_need", lambda *_: None)
            with advice:
                read(name, latents, index)
            read("warm", latents, index)
            del latents  # mapped pages stay in memory
    for name in names:
        yield name, {"milliseconds": measure.spread(times[name]), "megabytes": measure.spread(megabytes[name])}


def bytes_read() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def evicted(folder: Path) -> LatentSet:
    """The latent set in `folder`, none of it in the page cache."""
    data = LatentSet(folder)  # reads headers and labels
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not yet on the disk would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return data


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    columns = ("milliseconds", "megabytes")
    return measure.table(
        rows,
        {name: lambda row, name=name: "{median:.1f} ({low:.1f} to {high:.1f})".format(**row[name]) for name in columns},
    )


if __name__ == "__main__":
    errors.run(main)
