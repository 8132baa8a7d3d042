"""Grids of samples during training: EMA weights in eval mode, at fixed noise and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models import Backbone
from models.latents import Codec
from sampling import picture
from sampling.config import SamplingConfig
from sampling.sampler import Sampler

SETTINGS = SamplingConfig(mode="ode", solver="heun", num_steps=25)
# Settings to check, before a run begins, that samples can be drawn at all.
REHEARSAL = SamplingConfig(mode="ode", solver="heun", num_steps=2)


def write(
    path: Path,
    network: Backbone,
    codec: Codec,
    names: Sequence[str],
    dtype: torch.dtype | None,
    settings: SamplingConfig = SETTINGS,
) -> None:
    """Write a PNG of up to eight classes in rows, eight samples each; the same noise and labels every time.

    `names` are those of all classes, in the order of their labels.
    """
    classes = network.spec.num_classes
    rows = min(8, classes)
    shown = [row * classes // rows for row in range(rows)]
    labels = np.repeat(shown, 8)
    images = Sampler(network, codec, settings, len(labels), dtype).images(range(len(labels)), labels)
    picture.write(path, np.split(images, rows), [names[label] for label in shown])
