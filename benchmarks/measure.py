"""What the benchmarks share: their command, generated data, rates in turns, counts of launches, results row by row.

Rates are medians over repetitions with their range. Calls that are compared run in turns (A B A B), so that a machine
that becomes slower or busier does so for both. On a CPU the rate is per second of processor time, because others may
use the machine.
"""

from __future__ import annotations

import datetime
import io
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.latents import LatentSpace
from preprocessing import shards
from runtime import files, launch
from runtime.options import as_dict, read
from runtime.peaks import PEAKS
from runtime.streams import Stream
from runtime.text import aligned

# Options that choose rows and files, and change no row.
ASIDE = ("rows", "ablation", "peer", "chrome", "out")

Call = Callable[[], Any]
# Rows with their names, as they are measured.
Rows = Iterator[tuple[str, dict[str, Any]]]


def run(
    name: str,
    schema: type,
    argv: Sequence[str] | None,
    description: str | None,
    rows: Callable[[Any, Path, Mapping[str, Any]], Rows],
    report: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """Run a benchmark's command: measure what --out lacks, print the table, return the result.

    Args:
        schema: its options. If any of them differs but those in `ASIDE`, the rows of --out are measured anew.
        rows: measures rows, given the options, a temporary folder and the rows of --out.
        report: the table of the rows.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(schema, words, prog=f"python -m benchmarks.{name}", description=description)
    settings = {key: value for key, value in as_dict(config).items() if key not in ASIDE}
    earlier = files.read_json(config.out) if config.out and Path(config.out).is_file() else {}
    measured = earlier.get("rows", {}) if earlier.get("settings") == settings else {}
    command = f"python -m benchmarks.{name} {shlex.join(words)}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # of rows that do not name another
    precision = launch.precision_name(launch.precision(settings.get("mixed_precision"), device))
    result = {**environment(command), "precision": precision, "settings": settings, "rows": measured}
    with tempfile.TemporaryDirectory() as folder:
        for key, row in rows(config, Path(folder), measured):
            measured[key] = row
            if config.out:  # after each row, so that a command that is cut off continues after its last one
                files.write_json(config.out, result)
            if "images_per_second" in row:
                print(f"{key}: {row['images_per_second']['median']:g} images/s", flush=True)
    print(report(measured))
    return result


def environment(command: str) -> dict[str, Any]:
    """The circumstances of a result."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "commit": launch.commit() or "unknown",
        **launch.machine(),
        # mean number of running processes in the last minute: above the number of threads, others were busy too
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest, to five digits."""
    return {
        name: float(f"{value:.5g}")
        for name, value in (("median", statistics.median(values)), ("low", min(values)), ("high", max(values)))
    }


def alternate(
    calls: Mapping[str, Call], images: int, device: torch.device, *, steps: int, warmup: int, repetitions: int
) -> dict[str, dict[str, Any]]:
    """Images per second of each call, which makes `images` of them; `repetitions` rounds of `steps` calls, in turns.

    The row of every call but the first also says how many times faster the first is.
    """
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def seconds(call: Call) -> float:
        if cuda:
            torch.cuda.synchronize(device)
        started = clock()
        for _ in range(steps):
            call()
        if cuda:
            torch.cuda.synchronize(device)
        return clock() - started

    for call in calls.values():
        for _ in range(warmup):
            call()
    # in turns, so that a machine that slows down does so for all calls
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(repetitions)]
    rows = {name: {"images_per_second": spread([steps * images / times[name] for times in rounds])} for name in calls}
    first = next(iter(calls))
    for name in list(calls)[1:]:
        rows[name][f"{first}, times faster"] = spread([times[name] / times[first] for times in rounds])
    return rows


def counts(call: Call, device: torch.device) -> dict[str, float]:
    """Operators of one call; on CUDA also kernel launches, and microseconds of the host until the call returns."""
    times = 3 if device.type == "cuda" else 1
    with torch.profiler.profile(acc_events=True) as profile:
        for _ in range(times):
            call()
    events = profile.key_averages()
    row = {"operators": sum(event.count for event in events if event.key.startswith("aten::")) / times}
    if device.type == "cuda":
        row["launches"] = sum(event.count for event in events if "LaunchKernel" in event.key) / times
        # the fastest of several calls: what remains is the host's own work
        host = []
        for _ in range(times):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            call()
            host.append((time.perf_counter() - started) * 1e6)
        row["host_microseconds"] = round(min(host), 1)
    return row


def peak_memory(call: Call, device: torch.device) -> float | None:
    """GiB at the peak of one call; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


def mfu(images_per_second: float, flops_per_image: float) -> float | None:
    """Share of the device's stated bf16 peak, whatever the precision, that the network's own products reach.

    None if the peak is unknown.
    """
    peak = next((value for name, value in PEAKS.items() if name in launch.device_name()), None)
    return None if peak is None else round(images_per_second * flops_per_image / peak, 4)


def latent_set(folder: Path, *, channels: int, side: int, classes: int, items: int, images: bool = False) -> Path:
    """A latent set of standard normal means with small deviations, like VAE latents; with pictures if `images`."""
    values = Stream(0, "benchmark/latents").host.standard_normal((items, 1, 2, channels, side, side), dtype=np.float32)
    values[:, :, 1] = 0.1
    labels = Stream(0, "benchmark/labels").integers(classes, items)
    stride = 16 if channels > 4 else 8
    pictures = None
    if images:
        # a few pictures serve all items: a picture is decoded anew every time
        some = [png(stride * side, number) for number in range(min(items, 64))]
        pictures = [some[item % len(some)] for item in range(items)]
    entry = shards.write_shard(folder, 0, values.astype(np.float16), labels, images=pictures)
    space = LatentSpace(name="generated", channels=channels, stride=stride, shift=(0.0,), scale=(1.0,))
    shards.write_manifest(
        folder,
        space=space,
        resolution=stride * side,
        latent_size=side,
        views=1,
        parts=2,
        dtype="float16",
        crop="none",
        class_names=[str(label) for label in range(classes)],
        images=images,
        shards=[entry],
        source="standard normal numbers",
    )
    return folder


def png(side: int, seed: int) -> bytes:
    """A smooth random picture, which compresses about like a photograph: 1.4 bytes per pixel."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(256, size=(side // 4, side // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


# The columns of a table of rates.
RATE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "images/s": lambda row: f"{row['images_per_second']['median']:g}",
    "range": lambda row: f"{row['images_per_second']['low']:g} - {row['images_per_second']['high']:g}",
}


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    """Aligned text: a line per row, a cell per column, which is blank if the row lacks its value."""

    def cell(column: Callable[[Mapping[str, Any]], str], row: Mapping[str, Any]) -> str:
        try:
            return column(row)
        except (KeyError, TypeError):
            return ""

    lines = [
        ["", *columns],
        *([name, *(cell(column, row) for column in columns.values())] for name, row in rows.items()),
    ]
    return aligned(lines, rule=False)
