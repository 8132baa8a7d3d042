"""Grids of samples during training: EMA weights in eval mode, at fixed noise and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models import Backbone
from models.latents import Codec
from runtime import files
from sampling.config import SamplingConfig
from sampling.sampler import Sampler, grid_picture

SETTINGS = SamplingConfig(mode="ode", solver="heun", num_steps=25)


REHEARSAL = SamplingConfig(mode="ode", solver="heun", num_steps=2)
"""Settings to try, before a run begins, whether samples can be drawn at all."""


def write(path: Path, network: Backbone, codec: Codec, dtype: torch.dtype | None, seed: int,
          settings: SamplingConfig = SETTINGS) -> None:
    """Write a PNG of up to eight classes in rows, eight samples each; the same noise and labels every time."""
    from PIL import Image

    classes = min(8, network.spec.num_classes)
    labels = np.repeat(np.arange(classes) * network.spec.num_classes // classes, 8)
    sampler = Sampler(network, codec, settings, len(labels), dtype)
    images = sampler.images(range(len(labels)), labels)
    with files.replacing(path) as temporary:
        Image.fromarray(grid_picture(images, 8, scale=max(1, 64 // images.shape[1]))).save(temporary, format="PNG")
