"""Reading batches of random items: packed shards against the readers of the field, per core, page cache warm, in one run.

    python -m benchmarks.reader --out benchmarks/results/reader.json

- shards           `LatentSet.rows` over float16 moments (2, 4, 32, 32): what goes to the device, which converts
- shards, float32  `LatentSet.read`, converted on the host
- npy              one `np.load` per item over float32 moments (8, 32, 32), and its label, collated as a DataLoader does
- png+npy          the same, and one decoded 256 x 256 PNG per item (stored without compression): REPA's reader

All on one thread of one process, in turn within each repetition; a ratio compares neighbours in time. What is counted is
processor time, user and kernel (with a warm page cache nothing waits for a disk), so that a busy machine adds little.

Then memory:
batches in the training order from a sparse set of 2 million items (32 KiB of address space each, hardly any disk), while
the process's anonymous memory (RssAnon) should stay where it is; file pages (RssFile) belong to the kernel.
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

import dataset
from dataset import LatentSet
from models.latents import LatentSpace
from preprocessing import shards
from preprocessing.images import png
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read

SHARD = 4096
SPACE = LatentSpace(name="sd-vae", channels=4, stride=8, shift=(0.0,), scale=(0.18215,))


@dataclass(frozen=True, kw_only=True)
class Options:
    items: int = option(2048, help="items of the timed sets")
    batch_size: int = option(256, help="random items per batch")
    repetitions: int = option(9, help="repetitions")
    sparse_items: int = option(2_000_000, help="items of the sparse set")
    sparse_batches: int = option(300, help="batches read from it")
    folder: str | None = option(None, help="where to put the temporary sets (default: the system's place)")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = read(Options, words, prog="python -m benchmarks.reader", description=__doc__)
    require(options.batch_size <= options.items, "--batch-size is larger than --items")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            timed = time_readers(Path(folder), options)
            memory = measure_memory(Path(folder) / "sparse", options)
    finally:
        torch.set_num_threads(threads)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.reader {shlex.join(words)}".strip(),
        "processor": processor(),
        "load": load(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "items": options.items,
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        **timed,
        **memory,
    }
    _print(result)
    if options.out:
        files.write_json(options.out, result)
    return result


def time_readers(folder: Path, options: Options) -> dict[str, Any]:
    """Microseconds of processor time per item of each reader, and how many times faster the shards are."""
    latents = make_sets(folder, options.items)
    npy = sorted((folder / "npy").iterdir())
    pictures = sorted((folder / "png").iterdir())
    readers: dict[str, tuple[int, Callable[[np.ndarray], Any]]] = {  # calls per repetition
        "shards": (20, latents.rows),
        "shards, float32": (20, latents.read),
        "npy": (2, lambda chosen: default_collate([read_npy(npy, index) for index in chosen.tolist()])),
        "png+npy": (
            1,
            lambda chosen: default_collate(
                [(read_png(pictures, index), *read_npy(npy, index)) for index in chosen.tolist()]
            ),
        ),
    }
    generator = np.random.default_rng(0)
    draw = lambda: generator.permutation(options.items)[: options.batch_size]  # noqa: E731
    chosen = draw()
    np.testing.assert_array_equal(
        latents.rows(chosen)[0].reshape(-1, 8, 32, 32), readers["npy"][1](chosen)[0].half().numpy()
    )
    for index in np.array_split(
        np.arange(options.items), -(-options.items // options.batch_size)
    ):  # warm the page cache
        readers["png+npy"][1](index), latents.rows(index)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.repetitions):
        for name, (calls, read_batch) in readers.items():
            batches = [draw() for _ in range(calls)]
            began = time.process_time()
            for batch in batches:
                read_batch(batch)
            times[name].append((time.process_time() - began) / calls / options.batch_size * 1e6)
    ratios = {
        name: [peer / packed for peer, packed in zip(times[name], times["shards"])]
        for name in readers
        if name != "shards"
    }
    return {
        "microseconds_per_item": {name: spread(values) for name, values in times.items()},
        "times_faster": {name: spread(values) for name, values in ratios.items()},
    }


def make_sets(folder: Path, items: int) -> LatentSet:
    """The same random moments as a latent set and as one file per item, and a picture per item."""
    generator = np.random.default_rng(0)
    for name in ("npy", "png"):
        (folder / name).mkdir()
    entries = []
    for number, begin in enumerate(range(0, items, SHARD)):
        moments = np.abs(generator.standard_normal((min(SHARD, items - begin), 8, 32, 32), dtype=np.float32))
        entries.append(
            shards.write_shard(
                folder / "shards",
                number,
                moments.astype(np.float16).reshape(-1, 1, 2, 4, 32, 32),
                np.zeros(len(moments)),
            )
        )
        for index, item in enumerate(moments, begin):
            np.save(folder / "npy" / f"img-mean-std-{index:08d}.npy", item)
            picture = generator.integers(256, size=(256, 256, 3), dtype=np.uint8)
            (folder / "png" / f"img{index:08d}.png").write_bytes(png(picture, compress_level=0))
    write_manifest(folder / "shards", entries)
    return LatentSet(folder / "shards")


def write_manifest(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    shards.write_manifest(
        folder,
        space=SPACE,
        resolution=256,
        latent_size=32,
        views=1,
        parts=2,
        dtype="float16",
        crop="adm",
        class_names=["0"],
        images=False,
        shards=entries,
        source="benchmark",
    )


def read_npy(paths: Sequence[Path], index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (8, 32, 32) float32 and label of one item."""
    return torch.from_numpy(np.load(paths[index])), torch.tensor(0)


def read_png(paths: Sequence[Path], index: int) -> torch.Tensor:
    """Picture of one item, uint8 (3, H, W)."""
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(paths[index])).transpose(2, 0, 1))


def measure_memory(folder: Path, options: Options) -> dict[str, Any]:
    """RssAnon and RssFile in MiB before and after reading `sparse_batches` batches of a sparse set, and the highest RssAnon."""
    folder.mkdir()
    counts = [min(SHARD, options.sparse_items - begin) for begin in range(0, options.sparse_items, SHARD)]
    write_manifest(folder, [sparse_shard(folder, number, count) for number, count in enumerate(counts)])
    latents = LatentSet(folder)

    def read(step: int) -> None:
        latents.rows(dataset.order(0, step, options.batch_size, len(latents)))

    for step in range(10):  # the epoch's order and the buffers are there from now on
        read(step)
    before, peak = resident(), 0.0
    for step in range(10, 10 + options.sparse_batches):
        read(step)
        if step % 10 == 9:
            peak = max(peak, resident()["RssAnon"])
    after = resident()
    return {
        "sparse_items": options.sparse_items,
        "sparse_batches": options.sparse_batches,
        "resident_mib": {
            "before": before,
            "after": after,
            "highest_anonymous": peak,
            "anonymous_growth": round(max(peak, after["RssAnon"]) - before["RssAnon"], 1),
        },
    }


def sparse_shard(folder: Path, number: int, count: int) -> dict[str, Any]:
    """A shard of zeros that takes next to no disk."""
    size = count * 2 * 4 * 32 * 32 * 2
    header = json.dumps(
        {
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]},
            "latents": {
                "dtype": "F16",
                "shape": [count, 1, 2, 4, 32, 32],
                "data_offsets": [8 * count, 8 * count + size],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / shards.shard_name(number), "wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + 8 * count + size)
    return {"file": shards.shard_name(number), "count": count, "sha256": "0" * 64}


def resident() -> dict[str, float]:
    """Resident memory of this process in MiB, anonymous and of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: round(int(status[name].split()[0]) / 1024, 1) for name in ("RssAnon", "RssFile")}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), 2), "low": round(min(values), 2), "high": round(max(values), 2)}


def processor() -> str:
    """The processor's name, where the system says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def load() -> float:
    """Processes that were running in the last minute, on average: above 1, others were busy too."""
    return float(Path("/proc/loadavg").read_text().split()[0])


def _print(result: dict[str, Any]) -> None:
    print(f"\n{'reader':17}{'us/item':>10}{'range':>20}{'shards faster':>16}{'range':>18}")
    for name, row in result["microseconds_per_item"].items():
        ratio = result["times_faster"].get(name)
        faster = f"{ratio['median']:>15.1f}x{ratio['low']:>10.1f} -{ratio['high']:>6.1f}" if ratio else ""
        print(f"{name:17}{row['median']:>10.1f}{row['low']:>11.1f} -{row['high']:>7.1f}{faster}")
    memory = result["resident_mib"]
    print(
        f"{result['sparse_batches']} batches of {result['sparse_items']:,} items: anonymous memory grew by "
        f"{memory['anonymous_growth']} MiB (file pages {memory['before']['RssFile']} -> {memory['after']['RssFile']} MiB)"
    )


if __name__ == "__main__":
    errors.run(main)
