"""The flow-matching loss, and the `Learner`: a network and its alignments as one function from draws to named losses.

The learner draws no random numbers: data, noise, times and dropped labels come in, so every objective sees the same
draws, and tests can pass tensors made by hand. It is the only module that DDP wraps and that is differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import interpolant
from alignment import Alignment, Context
from alignment.interval import ALL, Selection
from models import Backbone, Tap
from models.routing import Route, Segments


@dataclass(frozen=True)
class Batch:
    """One micro-batch of draws; N samples, all on the training device."""

    x0: Tensor  # (N, C, H, W) clean normalised latents
    eps: Tensor  # (N, C, H, W) noise
    t: Tensor  # (N,) times, 1 is noise
    y: Tensor  # (N,) labels after dropout
    labels: Tensor  # (N,) true labels
    columns: dict[str, Tensor] = field(default_factory=dict)
    # alignment name -> its own random numbers
    draws: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # alignment name -> the samples on which it acts (`alignment.interval`); absent means all
    selections: dict[str, Selection] = field(default_factory=dict)
    # the order of the tokens, times (N, S) of segments that have their own, and blocks that some tokens leave out
    segments: Segments | None = None
    times: Tensor | None = None
    route: Route | None = None

    @functools.cached_property
    def xt(self) -> Tensor:
        """(N, C, H, W) noisy latents, each token at its time."""
        if self.segments is None or self.times is None:
            return interpolant.corrupt(self.x0, self.eps, self.t)
        return interpolant.corrupt(self.x0, self.eps, self.segments.on_grid(self.times, self.x0.shape[-1]))

    @functools.cached_property
    def on_route(self) -> Tensor | None:
        """(N, T) weights of mean 1 for the tokens that take the route, 0 for the others."""
        if self.route is None or self.segments is None:
            return None
        return self.segments.on_route(self.route)

    def context(self, name: str, features: dict[Tap, Tensor], ema: Backbone | None = None) -> Context:
        """What the alignment `name` may know of all N samples, given what it reads of the student.

        Tokens that leave a route count for nothing where a feature is from inside it.
        """
        inside = self.route is not None and any(isinstance(tap, int) and self.route.passes(tap) for tap in features)
        return Context(
            self.x0,
            self.eps,
            self.xt,
            self.t,
            self.y,
            self.labels,
            features,
            self.columns,
            self.draws.get(name, {}),
            ema,
            segments=self.segments,
            times=self.times,
            token_weight=self.on_route if inside else None,
        )


def flow_matching(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Flow-matching loss per sample, (N,) float32: mean squared error over all elements.

    `mse+cosine` adds LightningDiT's 1 - cosine over the channels, averaged over space.
    """
    prediction, target = prediction.float(), target.float()
    loss = (prediction - target).square().flatten(1).mean(1)
    if kind == "mse+cosine":
        loss = loss + (1 - F.cosine_similarity(prediction, target, dim=1)).flatten(1).mean(1)
    return loss


class Learner(nn.Module):
    """Network plus alignments. Plain training is the empty mapping of alignments."""

    def __init__(
        self,
        network: Backbone,
        alignments: Mapping[str, Alignment] | None = None,
        *,
        velocity_loss: str = "mse",
        autocast: torch.dtype | None = None,
        ema: Backbone | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        # torch's ModuleDict is not generic
        self.alignments: Mapping[str, Alignment] = nn.ModuleDict(alignments or {})  # type: ignore[assignment]
        self.velocity_loss = velocity_loss
        self.autocast = autocast
        self._ema = [ema]  # in a list, so that DDP, optimiser and checkpoint do not see it
        self.taps = {tap for alignment in self.alignments.values() for tap in alignment.taps}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses: `diffusion` (N,) per sample, and a scalar for each alignment, before its weight."""
        mixed = nullcontext() if self.autocast is None else torch.autocast(batch.x0.device.type, self.autocast)
        with mixed:
            output = self.network(
                batch.xt,
                batch.t if batch.times is None else batch.times,
                batch.y,
                taps=self.taps,
                segments=batch.segments,
                route=batch.route,
            )
            losses = {
                "diffusion": flow_matching(
                    output.velocity, interpolant.velocity(batch.x0, batch.eps), self.velocity_loss
                )
            }
            for name, alignment in self.alignments.items():
                features = {tap: output.features[tap] for tap in alignment.taps}
                context = batch.context(name, features, self._ema[0])
                losses[name] = batch.selections.get(name, ALL).mean(alignment, context, alignment.coupled)
        return losses
