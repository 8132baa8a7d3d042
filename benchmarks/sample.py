"""Images per second of sampling as users do it: guided SDE, with and without the decoder, from a random network.

    python -m benchmarks.sample --model SiT-XL/2 --out benchmarks/results/sample-SiT-XL-2.json
    python -m benchmarks.sample --model SiT-XL/2 --peer ../REPA

Rows: latents alone; images (latents, decoder, pixels on the host, with batches overlapped as in `generate.py`); and
with --peer REPA's own sampler and network in turns with ours. A decoder of the SD-VAE's shape with random weights costs
as much as the published one. Guidance is on below t 0.7, as in REPA's protocol: 250 steps are 422 evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import models
from benchmarks import measure, peer
from models import Backbone, attention
from models.latents import LatentSpace
from models.layers import cast_block_linears
from models.pixels import PixelCodec, pixels
from models.vae import open_codec
from runtime import errors, launch
from runtime.errors import note, require
from runtime.options import option
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
        right = self.peer is None or self.classes == 1000
        require(right, f"--classes {self.classes}: REPA's sampler has 1000 classes; leave out --classes")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("sample", SampleConfig, argv, __doc__, rows, report)


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    return measure.table(
        rows,
        {
            **measure.RATE,
            "evaluations": lambda row: f"{row['evaluations']}",
            "peak GiB": lambda row: f"{row['peak_gib']:.1f}",
            "times faster": lambda row: f"{row['latents, times faster']['median']:.2f}",
        },
    )


def rows(config: SampleConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The rows that are not known yet."""
    device = launch.accelerator().device
    sampler = open_sampler(config, device)
    batch = config.batch_size

    def rates(calls: dict[str, measure.Call], images: int) -> dict[str, dict[str, Any]]:
        measured = measure.alternate(calls, images, device, steps=1, warmup=1, repetitions=config.repetitions)
        return {name: {**row, "evaluations": sampler.settings.evaluations} for name, row in measured.items()}

    latents = lambda: sampler.latents(range(batch))  # noqa: E731
    if "latents" not in known:
        row = rates({"latents": latents}, batch)["latents"]
        peak = measure.peak_memory(latents, device)
        yield "latents", row if peak is None else {**row, "peak_gib": peak}
    if find_spec("diffusers") is None:
        note("the row images is left out: its decoder needs diffusers")
    elif "images" not in known:
        space = LatentSpace(name="generated", channels=4, stride=8, shift=(0.0,), scale=(0.18215,))
        compiling, _ = launch.compiles(config.compile, device)
        sampler.codec = open_codec(decoder(folder, config.decoder), space=space, device=device, compile=compiling)
        # two batches as one stream, so that the device works on one while the other is decoded
        batches = [range(batch), range(batch, 2 * batch)]
        yield "images", rates({"images": lambda: list(sampler.stream(batches))}, 2 * batch)["images"]
    if config.peer and "REPA's sampler" not in known:
        call = peer.SamplingCall(
            Path(config.peer), config.model, batch, config.latent_size, config.classes, device, sampler.settings
        )
        pair = rates({"latents": latents, "REPA's sampler": call}, batch)
        yield "latents, beside REPA's sampler", pair["latents"]
        yield "REPA's sampler", pair["REPA's sampler"]


def open_sampler(config: SampleConfig, device: torch.device) -> Sampler:
    """A sampler as in `generate.py`, of a network with random weights; it does not decode."""
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
    return Sampler(network, PixelCodec(pixels(4)), settings, 4 * config.batch_size, dtype)


def decoder(folder: Path, shape: str) -> str:
    """Folder of a VAE with random weights, of the SD-VAE's shape, or tiny with the same stride."""
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
