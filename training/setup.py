"""From options to what they come to on a data set: network, alignments, stops. Nothing is built yet.

Training (`training/run.py`), `--dry-run` and the benchmarks start from the same `Setup`, so that what is counted and timed
is what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import dataset
import models
from alignment import Alignment, AlignOptions, BuildContext, find
from config import TrainConfig
from dataset import LatentSet
from loss import Learner
from models import Backbone
from models.recompute import recompute


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on its data set.

    Raises (`Setup.of`):
        UserError: data that is missing or damaged, a network or options that do not fit it.
    """

    config: TrainConfig
    data: LatentSet
    spec: models.ModelSpec
    options: dict[str, AlignOptions]
    """Of each alignment, resolved for this network."""
    epoch_steps: int
    stops: dict[str, int | None]
    """The step after which each alignment is gone, None for never."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        options: Mapping[str, AlignOptions],
        device: torch.device | str = "cpu",
        data: LatentSet | None = None,
    ) -> Setup:
        """Open the data set (unless it is given), whose latents may be kept on `device`, and resolve the options."""
        data = data or LatentSet(config.data_dir, resident=config.resident, device=device)
        epoch_steps = dataset.steps_per_epoch(len(data), config.batch_size)
        spec = models.spec(
            config.model,
            in_channels=data.channels,
            input_size=data.latent_size,
            num_classes=data.num_classes,
            qk_norm=config.qk_norm,
        )
        resolved = {name: find(name).resolve(chosen, spec, config.batch_size) for name, chosen in options.items()}
        return cls(
            config,
            data,
            spec,
            resolved,
            epoch_steps,
            {name: chosen.stop(epoch_steps) for name, chosen in resolved.items()},
        )

    def alive(self, step: int) -> list[str]:
        """The alignments that still act after `step` optimiser steps."""
        return [name for name, stop in self.stops.items() if stop is None or step < stop]

    def alignments(self, names: list[str], setting: BuildContext) -> dict[str, Alignment]:
        """The alignments called `names`, with their heads and frozen networks."""
        return {name: find(name)(self.options[name], setting) for name in names}

    def learner(
        self, network: Backbone, alignments: Mapping[str, Alignment], dtype: torch.dtype | None, ema: Backbone
    ) -> Learner:
        """What is differentiated: network and alignments under the run's loss, precision and activation checkpointing."""
        recompute(network, self.config.activation_checkpointing)
        return Learner(
            network,
            alignments,
            velocity_loss=self.config.velocity_loss,
            autocast=dtype,
            ema=ema if any(alignment.reads_ema for alignment in alignments.values()) else None,
        )
