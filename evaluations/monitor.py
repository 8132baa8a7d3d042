"""Checks during training: grids of samples, and scores of a few thousand samples, at regular steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from config import TrainConfig
from dataset import LatentSet
from evaluations.reference import open_pair
from evaluations.score import Scorer, add_drawn
from models import Backbone, ModelSpec
from models.latents import Codec
from models.vae import open_codec
from runtime import launch
from sampling import presets, preview
from sampling.classes import readable
from sampling.config import SamplingConfig
from sampling.sampler import Sampler, image_shape

BATCH = 64  # samples per network call in each process


def watch(
    config: TrainConfig, folder: Path, spec: ModelSpec, data: LatentSet, accelerator: Accelerator
) -> list[Scores | Previews]:
    """Open what `config` asks for. Call it before the first step, so that a missing file fails before training starts.

    Raises:
        UserError: a VAE, a reference, weights or images are missing or do not fit.
    """
    if not (config.sampling_steps or config.eval_steps):
        return []
    compiling, _ = launch.compiles(config.compile, accelerator.device)
    # scores and previews share the decoder: if the preset brings it, the previews use it too
    vae = config.vae or presets.decoder(config.eval_preset, data.space) or data.space.vae
    codec = open_codec(
        vae,
        space=data.space,
        device=accelerator.device,
        compile=compiling,
        otherwise="; or leave out --sampling-steps and --eval-steps: training itself needs no VAE",
    )
    watched: list[Scores | Previews] = []
    if config.eval_steps:
        watched.append(Scores(config, codec, accelerator, (spec.in_channels, spec.input_size, spec.input_size)))
    if config.sampling_steps:
        watched.append(Previews(config, codec, accelerator, folder / "samples", readable(data.manifest["class_names"])))
    return watched


class Scores:
    """Metrics of a few thousand samples against a reference; the same noise and labels every time.

    Args:
        latent: (C, H, W) of the network's latents.
    """

    def __init__(self, config: TrainConfig, codec: Codec, accelerator: Accelerator, latent: tuple[int, ...]) -> None:
        self.every, self.count, self.weights = config.eval_steps, config.num_fid_samples, config.eval_weights
        self.preset = config.eval_preset
        self.settings = (
            preview.SETTINGS if self.preset is None else SamplingConfig(**presets.find(self.preset).settings)
        )
        self.codec, self.accelerator = codec, accelerator
        assert config.reference is not None  # config.py asks for it with --eval-steps
        self.reference, self.extractor = open_pair(config.reference, config.scores, accelerator)
        self.mind = self.reference.pool is not None
        self.reference.require_shape("the samples", image_shape(codec, latent, accelerator.device))

    def __call__(self, step: int, networks: Mapping[str, Backbone], dtype: torch.dtype | None) -> dict[str, float]:
        """Metrics by name and sample count (`eval/fid@5000`), prefixed with the preset and with `raw` for raw weights.

        A preset samples in float32 with TF32, as its published numbers do, whatever the run's precision.
        """
        values: dict[str, float] = {}
        for weights in self.weights:
            measured = self._score(
                networks[weights], self.settings, self.count, dtype, f"evaluation of {weights} weights: sampling"
            )
            place = "/".join(["eval", *([self.preset] if self.preset else []), *(["raw"] if weights == "raw" else [])])
            values |= {f"{place}/{name}@{self.count}": value for name, value in measured.items()}
        return values

    def rehearse(self, network: Backbone, dtype: torch.dtype | None) -> None:
        """Score a few samples of two steps, so that a failure shows before the first step of training."""
        self._score(network, preview.REHEARSAL, 8, dtype, "rehearsal: sampling")

    def _score(
        self, network: Backbone, settings: SamplingConfig, count: int, dtype: torch.dtype | None, title: str
    ) -> dict[str, float]:
        """Metrics of `count` samples, in the precision of the preset, else in that of the run."""
        sampler = Sampler(network, self.codec, settings, count, None if self.preset else dtype)
        scorer = Scorer(self.reference, self.extractor, accelerator=self.accelerator, mind=self.mind)
        with launch.tf32_inside(self.accelerator.device) if self.preset else nullcontext():
            add_drawn(scorer, sampler, count, BATCH, title)
            return scorer.result()["metrics"]


class Previews:
    """A grid of samples as a picture. The main process draws it and returns its path.

    Args:
        names: of the classes, in the order of their labels.
    """

    def __init__(
        self, config: TrainConfig, codec: Codec, accelerator: Accelerator, folder: Path, names: Sequence[str]
    ) -> None:
        self.every, self.codec, self.folder, self.names = config.sampling_steps, codec, folder, names
        self.main = accelerator.is_main_process

    def __call__(self, step: int, networks: Mapping[str, Backbone], dtype: torch.dtype | None) -> dict[str, Path]:
        if not self.main:
            return {}
        path = self.folder / f"{step:07d}.png"
        preview.write(path, networks["ema"], self.codec, self.names, dtype)
        return {"samples": path}

    def rehearse(self, network: Backbone, dtype: torch.dtype | None) -> None:
        """Draw a grid of two steps and delete it, so that a failure shows before the first step of training."""
        if self.main:
            picture = self.folder / "rehearsal.png"
            preview.write(picture, network, self.codec, self.names, dtype, preview.REHEARSAL)
            picture.unlink()
