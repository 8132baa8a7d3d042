"""Images per second of sampling as users do it: guided SDE, with and without the decoder, from a network of random weights.

    python -m benchmarks.sample --model SiT-XL/2 --out benchmarks/results/sample-SiT-XL-2.json
    python -m benchmarks.sample --model SiT-XL/2 --peer ../REPA

Rows: latents alone, images (latents, decoder, pixels on the host, one batch behind the other as `generate.py` has it), and
with --peer REPA's own sampler and network in turns with ours. A decoder of the SD-VAE's shape with random weights costs what the
published one does. Guidance is on below t 0.7, as in REPA's protocol: 250 steps are 422 evaluations.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import models
from benchmarks import measure, peer
from models import Backbone, attention
from models.latents import LatentSpace
from models.layers import cast_block_linears
from models.vae import open_codec
from runtime import errors, launch
from runtime.errors import require
from runtime.options import option, read
from sampling.config import SamplingConfig
from sampling.sampler import Sampler

SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
TINY_VAE = {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of the benchmark."""

    model: str = option("SiT-XL/2", help="network")
    batch_size: int = option(64, help="samples per network call")
    num_steps: int = option(250, help="steps of the SDE")
    cfg_scale: float = option(1.8, help="guidance scale")
    guidance_high: float = option(0.7, help="guide while t is at most this")
    repetitions: int = option(3, help="repetitions, of one batch each")
    latent_size: int = option(32, help="side of a latent")
    classes: int = option(1000, help="classes")
    decoder: str = option("sd-vae", choices=("sd-vae", "tiny"), help="shape of the decoder")
    mixed_precision: str | None = option(None, help="no or bf16 (default: that of a run)")
    compile: str | None = option(None, help="on, combined or off (default: that of a run)")
    peer: str | None = option(None, help="checkout of REPA: its sampler beside ours, in turns")
    out: str | None = option(None, help="result file")

    def __post_init__(self) -> None:
        require(
            self.peer is None or self.classes == 1000, "REPA's sampler knows 1000 classes alone: leave out --classes"
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(SampleConfig, words, prog="python -m benchmarks.sample", description=__doc__)
    settings = {name: value for name, value in asdict(config).items() if name not in ("peer", "out")}
    results = measure.Results(config.out, f"python -m benchmarks.sample {shlex.join(words)}", settings)
    device = launch.accelerator().device
    with tempfile.TemporaryDirectory() as folder:
        for name, row in rows(config, device, Path(folder), results.rows):
            results.add(name, row)
            print(f"{name}: {row['images_per_second']['median']:g} images/s", flush=True)
    print(report(results.rows))
    return results.result()


def report(found: dict[str, dict[str, Any]]) -> str:
    """The table of a result."""
    return measure.table(
        found,
        {
            **measure.RATE,
            "evaluations": lambda row: f"{row['evaluations']}",
            "peak GiB": lambda row: f"{row['peak_gib']:.1f}",
            "times faster": lambda row: f"{row['latents, times faster']['median']:.2f}",
        },
    )


def rows(
    config: SampleConfig, device: torch.device, folder: Path, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that are not known yet, each with its name."""
    sampler = open_sampler(config, device, folder)
    batch = config.batch_size

    def measured(calls: dict[str, measure.Call], images: int) -> dict[str, dict[str, Any]]:
        found = measure.alternate(calls, images, device, steps=1, warmup=1, repetitions=config.repetitions)
        return {name: {**row, "evaluations": sampler.settings.evaluations} for name, row in found.items()}

    latents = lambda: sampler.latents(range(batch))  # noqa: E731
    if "latents" not in known:
        row = measured({"latents": latents}, batch)["latents"]
        peak = measure.peak_memory(latents, device)
        yield "latents", row if peak is None else {**row, "peak_gib": peak}
    if "images" not in known:
        yield "images", measured({"images": images_of(sampler, batch, 2)}, 2 * batch)["images"]
    if config.peer and "REPA's sampler" not in known:
        theirs = peer.SamplingCall(
            Path(config.peer), config.model, batch, config.latent_size, config.classes, device, sampler.settings
        )
        found = measured({"latents": latents, "REPA's sampler": theirs}, batch)
        yield "latents, beside REPA's sampler", found["latents"]
        yield "REPA's sampler", found["REPA's sampler"]


def images_of(sampler: Sampler, batch: int, batches: int) -> Callable[[], None]:
    """Images of so many batches, one behind the other."""

    def call() -> None:
        for _ in sampler.stream(range(start * batch, (start + 1) * batch) for start in range(batches)):
            pass

    return call


def open_sampler(config: SampleConfig, device: torch.device, folder: Path) -> Sampler:
    """A sampler as `generate.py` has it, of a network and a decoder with random weights."""
    spec = models.spec(config.model, in_channels=4, input_size=config.latent_size, num_classes=config.classes)
    network: Backbone = models.build(spec).to(device).eval().requires_grad_(False)
    dtype = launch.precision(config.mixed_precision, device)
    compiling, _ = launch.compiles(config.compile, device)
    if compiling:
        launch.compile_network(network, [], config.compile, device)
    cast_block_linears(network, dtype)
    if device.type == "cuda":
        print("attention:", attention.choose(network, config.batch_size, dtype, backward=False))
    settings = SamplingConfig(
        num_steps=config.num_steps, cfg_scale=config.cfg_scale, guidance_high=config.guidance_high
    )
    space = LatentSpace(name="generated", channels=4, stride=8, shift=(0.0,), scale=(0.18215,))
    codec = open_codec(decoder(folder, config.decoder), space=space, device=device, compile=compiling)
    return Sampler(network, codec, settings, 4 * config.batch_size, dtype)


def decoder(folder: Path, shape: str) -> str:
    """A VAE of the SD-VAE's shape, or a tiny one of its stride, with random weights."""
    from diffusers import AutoencoderKL

    options = SD_VAE if shape == "sd-vae" else TINY_VAE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.18215,
            **options,
        )
    vae.save_pretrained(folder / shape)
    return str(folder / shape)


if __name__ == "__main__":
    errors.run(main)
