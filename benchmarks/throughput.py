"""Images per second of plain training, stage 1, stage 2 and sampling, on generated latents, in one run.

    python -m benchmarks.throughput --model SiT-XL/2 --batch-size 256 --out benchmarks/results/throughput-SiT-XL-2.json

The real loop's step is timed (data, draws, forward, backward, clip, AdamW, EMA, loss sums), `repetitions` times
`steps` steps after a warm-up, with one wait for the device at the end of each repetition. Rates are medians; the spread
is the range over the repetitions. Ratios are to plain training in the same run.
"""

from __future__ import annotations

import datetime
import platform
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

from config import SamplingConfig
from models.latents import LatentSpace
from models.pixels import PixelCodec
from preprocessing import shards
from runtime import errors, files
from runtime.options import option, read
from runtime.streams import Stream
from sampling.sampler import Sampler
from training import command, loop
from training.log import Meter
from training.run import Run

ROWS = {"plain": (), "stage 1": ("--align", "latent"), "stage 2": ("--align-stop-steps", "0"),
        "stage 2, interval 0.4-0.7": ("--align-stop-steps", "0", "--align-interval", "0.4", "0.7")}


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Options of the benchmark."""

    model: str = option("SiT-B/2", help="network")
    batch_size: int = option(256, help="samples per step")
    steps: int = option(50, help="timed steps per repetition")
    repetitions: int = option(5, help="repetitions")
    warmup: int = option(20, help="steps before the first")
    sampling_steps: int = option(50, help="ODE steps of the sampling row")
    latent_size: int = option(32, help="side of the generated latents")
    classes: int = option(1000, help="classes of the generated latents")
    items: int = option(4096, help="generated latents")
    mixed_precision: str | None = option(None, help="no or bf16 (default: bf16 on CUDA hardware that has it)")
    compile: str | None = option(None, choices=("on", "off"), help="compile each block (default: on with CUDA)")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(ThroughputConfig, words, prog="python -m benchmarks.throughput", description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: rate for name, rate in _rows(config, Path(folder))}
    result = {"date": datetime.date.today().isoformat(), "command": f"python -m benchmarks.throughput {' '.join(words)}",
              "device": _device(), "torch": torch.__version__, "model": config.model, "batch_size": config.batch_size,
              "steps": config.steps, "repetitions": config.repetitions, "images_per_second": rows}
    print(f"\n{'':28}{'images/s':>10}{'range':>20}{'to plain':>10}{'peak GiB':>10}")
    for name, row in rows.items():
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        print(f"{name:28}{row['median']:>10.1f}{row['low']:>10.1f} -{row['high']:>8.1f}"
              f"{row['median'] / rows['plain']['median']:>10.2f}{memory:>10}")
    if config.out:
        files.write_json(config.out, result)
    return result


def _rows(config: ThroughputConfig, folder: Path):
    data = latents(folder / "latents", config)
    common = ["--data-dir", str(data), "--output-dir", str(folder / "exps"), "--model", config.model, "--batch-size",
              str(config.batch_size), "--max-train-steps", "100000000"]
    for flag in ("mixed_precision", "compile"):
        if (value := getattr(config, flag)) is not None:
            common += [f"--{flag.replace('_', '-')}", value]
    for name, words in ROWS.items():
        guided = name.startswith("stage 2")
        extra = ["--guiding-ckpt", str(folder / "exps" / "plain")] if guided else []
        run = training_run([*common, "--exp-name", name, *words, *extra], guided)
        if name == "plain":
            run.step = 1
            run.save()  # the teacher of stage 2 costs the same whatever it has learnt
        yield name, measure(training_step(run), config, run.device)
        if name == "plain":
            yield f"sampling, {config.sampling_steps} Euler steps", measure(sampling_call(run, config), config, run.device, calls=1)
        del run


def training_run(words: list[str], guided: bool) -> Run:
    """A run as `train.py` builds it, ready for its first step."""
    return Run(*command.resolve(words, "benchmarks.throughput", None, ("guided",) if guided else ()))


def training_step(run: Run) -> Callable[[], None]:
    """One optimiser step of the real loop."""
    endless = loop.steps(run, 100_000_000, Meter(run.accelerator))
    return lambda: next(endless)


def sampling_call(run: Run, config: ThroughputConfig) -> Callable[[], None]:
    """One batch of latents from the EMA network."""
    settings = SamplingConfig(mode="ode", num_steps=config.sampling_steps)
    sampler = Sampler(run.ema.network, PixelCodec(run.data.space), settings, config.batch_size, run.dtype)
    return lambda: sampler.latents(range(config.batch_size))


def measure(call: Callable[[], None], config: ThroughputConfig, device: torch.device, calls: int | None = None) -> dict[str, Any]:
    """Median, lowest and highest images per second over the repetitions, and the peak memory on CUDA."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(config.warmup if calls is None else calls):
        call()
    rates = []
    for _ in range(config.repetitions):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls or config.steps):
            call()
        if cuda:
            torch.cuda.synchronize(device)
        rates.append((calls or config.steps) * config.batch_size / (time.perf_counter() - start))
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates),
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None}


def latents(folder: Path, config: ThroughputConfig) -> Path:
    """A latent set of standard normal means with small deviations, as SD-VAE latents have."""
    side = config.latent_size
    values = Stream(0, "benchmark/latents").host.standard_normal((config.items, 1, 2, 4, side, side), dtype=np.float32)
    values[:, :, 1] = 0.1
    labels = Stream(0, "benchmark/labels").integers(config.classes, config.items)
    entry = shards.write_shard(folder, 0, values.astype(np.float16), labels)
    space = LatentSpace(name="generated", channels=4, stride=8, shift=(0.0,), scale=(1.0,))
    shards.write_manifest(folder, space=space, resolution=8 * side, latent_size=side, views=1, parts=2, dtype="float16", crop="none",
                          class_names=[str(label) for label in range(config.classes)], images=False, shards=[entry],
                          source="standard normal numbers")
    return folder


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


if __name__ == "__main__":
    errors.run(main)
