"""Images per second that the training loader delivers, while nothing else runs: what a device can be fed at most.

    python -m benchmarks.loader --out benchmarks/results/loader.json

Rows: the batches of a plain run, and of one whose encoder wants images (`repa`, `haste`), with one decoding thread and with as
many as there are cores. The real batches are timed: host draws, rows, PNG decoding, posterior, noise. How latents are stored,
against one file per item, is measured by `benchmarks.reader`.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from config import FeatureOptions, TrainConfig
from dataset import LatentSet
from runtime import errors, launch
from runtime.options import option, read
from training.batches import Batches


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Options of the benchmark."""

    batch_size: int = option(256, help="samples per step")
    steps: int = option(8, help="timed steps per repetition")
    repetitions: int = option(5, help="repetitions")
    items: int = option(2048, help="items of the generated set")
    latent_size: int = option(32, help="side of a latent; images are eight times as wide")
    out: str | None = option(None, help="result file")


class Wanting:
    """Stands for an alignment that wants columns, and does nothing with them."""

    def __init__(self, *columns: str) -> None:
        self.columns, self.options, self.coupled = (
            columns,
            type("Options", (), {"interval": None, "mask": "select"}),
            False,
        )

    def draw(self, *_: Any) -> dict[str, Any]:
        return {}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(LoaderConfig, words, prog="python -m benchmarks.loader", description=__doc__)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    results = measure.Results(config.out, f"python -m benchmarks.loader {shlex.join(words)}".strip(), settings)
    device, cores = launch.accelerator().device, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        data = measure.latent_set(
            Path(folder) / "set", channels=4, side=config.latent_size, classes=1000, items=config.items, images=True
        )
        for name, threads in (
            ("latents", 0),
            ("latents and images, 1 thread", 1),
            (f"latents and images, {cores} threads", cores),
        ):
            if name not in results.rows:
                results.add(name, timed(config, data, device, threads))
    print(measure.table(results.rows, measure.RATE))
    return results.result()


def timed(config: LoaderConfig, data: Path, device: torch.device, threads: int) -> dict[str, Any]:
    """Images per second by the clock on the wall: threads are what is measured. `threads` 0 wants no images."""
    train = TrainConfig(data_dir=str(data), exp_name="loader", batch_size=config.batch_size, scores=FeatureOptions())
    latents = LatentSet(data)
    if threads:
        latents._decoders = ThreadPoolExecutor(threads, "decoder")
    wanting = {"wanting": Wanting("image")} if threads else {}
    source = Batches(train, latents, device, 0, 1)
    rates = []
    for repetition in range(config.repetitions + 1):  # the first warms the page cache
        started, first = time.perf_counter(), repetition * config.steps
        for _ in source.steps(first, first + config.steps, wanting):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(config.steps * config.batch_size / (time.perf_counter() - started))
    return {"images_per_second": measure.spread(rates[1:])}


if __name__ == "__main__":
    errors.run(main)
