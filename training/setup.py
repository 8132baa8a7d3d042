"""Options resolved on a data set: network, alignments, stops. Nothing is built yet.

Training (`training/run.py`), `--dry-run` and the benchmarks start from the same `Setup`, so they count and time what is
trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import dataset
import models
from alignment import Alignment, AlignOptions, BuildContext, find
from config import TrainConfig
from dataset import LatentSet
from loss import Learner
from models import QK, Backbone
from models.recompute import recompute
from models.routing import Route
from runtime.errors import require


def spec_of(config: TrainConfig, data: LatentSet) -> models.ModelSpec:
    """The network of `config` on the latents and classes of `data`."""
    return models.spec(
        config.model,
        in_channels=data.channels,
        input_size=data.latent_size,
        num_classes=data.num_classes,
        qk_norm=config.qk_norm,
    )


@dataclass(frozen=True)
class Setup:
    """A configuration resolved on its data set.

    Raises (`Setup.of`):
        UserError: the data is missing or damaged, or network or options do not fit it.
    """

    config: TrainConfig
    data: LatentSet
    spec: models.ModelSpec
    # Options of each alignment, resolved for this network.
    options: dict[str, AlignOptions]
    epoch_steps: int
    # The step after which each alignment is gone, None for never. With schedule `plateau` the latest end, until an
    # earlier one is measured.
    stops: dict[str, int | None]
    route: Route | None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        options: Mapping[str, AlignOptions],
        device: torch.device | str = "cpu",
        data: LatentSet | None = None,
    ) -> Setup:
        """Open the data set, unless `data` is given, and resolve the options. `device` may hold the latents."""
        data = data or LatentSet(config.data_dir, resident=config.resident, device=device)
        epoch_steps = dataset.steps_per_epoch(len(data), config.batch_size)
        spec = spec_of(config, data)
        resolved = {name: find(name).resolve(chosen, spec, config.batch_size) for name, chosen in options.items()}
        for name, chosen in resolved.items():
            find(name).check(chosen)
        route = Route.of(config.route)
        if route is not None:
            route.check(spec.depth)
        return cls(
            config,
            data,
            spec,
            resolved,
            epoch_steps,
            {name: chosen.stop(epoch_steps) for name, chosen in resolved.items()},
            route,
        )

    def ending(self, stops: Mapping[str, int | None]) -> Setup:
        """The same setup with other ends for some alignments."""
        return dataclasses.replace(self, stops={**self.stops, **stops})

    def alive(self, step: int) -> list[str]:
        """The alignments that still act after `step` optimiser steps."""
        return [name for name, stop in self.stops.items() if stop is None or step < stop]

    def alignments(self, names: list[str], context: BuildContext) -> dict[str, Alignment]:
        """The alignments called `names`, with their heads and frozen networks.

        Raises UserError for those that do not go together, or not with the run's route.
        """
        alignments = {name: find(name)(self.options[name], context) for name in names}
        _require_one_order(alignments, self.route)
        return alignments

    def learner(
        self, network: Backbone, alignments: Mapping[str, Alignment], dtype: torch.dtype | None, ema: Backbone
    ) -> Learner:
        """The module to differentiate: network and alignments with the run's loss, precision and recomputation."""
        recompute(network, self.config.activation_checkpointing)
        return Learner(
            network,
            alignments,
            velocity_loss=self.config.velocity_loss,
            autocast=dtype,
            ema=ema if any(alignment.reads_ema for alignment in alignments.values()) else None,
        )


def _require_one_order(alignments: Mapping[str, Alignment], route: Route | None) -> None:
    """Refuse alignments that would order or time the tokens of a sample in different ways."""
    segmented = [name for name, alignment in alignments.items() if alignment.segmented]
    require(
        len(segmented) < 2, f"--align {' '.join(segmented)}: each gives tokens times of their own; choose one of them"
    )
    for name, alignment in alignments.items() if segmented else ():
        require(
            not alignment.whole_time,
            f"--align {segmented[0]} gives tokens times of their own, and {name} needs a single time; leave one out",
        )
        require(
            alignment.options.interval is None and alignment.options.time_weights == "none",
            f"--align-interval and --align-time-weights choose samples by their time, and {segmented[0]} has two; "
            f"leave them out",
        )
    for name, alignment in alignments.items() if route else ():
        maps = [tap.block for tap in alignment.taps if isinstance(tap, QK) and route and route.passes(tap.block)]
        require(
            not maps,
            f"--route: {name} compares the attention of block {max(maps, default=0)}, which not all tokens see; choose "
            f"blocks outside the route",
        )
