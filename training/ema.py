"""Moving averages of a network's weights, each in one fused operation a step.

Two profiles: exponential (`Exponential`), and a power of time (`Power`), from which averages of any length can be
computed after training (`training.posthoc`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from alignment import Alignment
from config import TrainConfig
from models import Backbone

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Exponential:
    """The decay d of an exponential average: constant, or under warm-up min(decay, (1 + s) / (10 + s)) in update s."""

    decay: float
    warmup: bool = False

    def __call__(self, step: int) -> float:
        """d of update `step`, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True)
class Power:
    """The decay d = (1 - 1/s)^(gamma + 1) of an average whose profile is the power gamma of time.

    EDM2, arXiv 2312.02696, eq. 127.
    """

    # The profile's standard deviation over the time trained, which fixes gamma.
    length: float

    def __call__(self, step: int) -> float:
        """d of update `step`, counted from 1."""
        return (1 - 1 / step) ** (exponent(self.length) + 1)


@cache
def exponent(length: float) -> float:
    """gamma of the profile of `length`: largest root of length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (eq. 126)."""
    return float(max(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real))


def stored_name(length: float) -> str:
    """The name of the average of `length` among a checkpoint's weights."""
    return f"ema-length-{length}"


class EMA(Generic[N]):
    """Keeps `network`, a frozen copy in eval mode whose parameters follow the trained ones.

    After update s (counted from 1): ema <- d ema + (1 - d) weights, with d = `decay`(s).
    """

    def __init__(self, network: N, decay: Callable[[int], float]) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        # parameter objects, not their values: a moved parameter stays the same object, so the lists stay valid
        self._averages: list[torch.Tensor] = list(self.network.parameters())
        self._trained: list[torch.Tensor] = list(network.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights; `step` counts optimiser updates from 1."""
        torch._foreach_lerp_(self._averages, self._trained, 1 - self.decay(step))


def averages(config: TrainConfig, network: Backbone, alignments: Mapping[str, Alignment]) -> dict[str, EMA[Any]]:
    """Every average of a run by its name in a checkpoint.

    These are `ema`, those of `ema_extra_decays` and `--ema-lengths`, and for each of them one of every head that
    predicts the velocity.
    """
    decays: dict[str, Callable[[int], float]] = {"ema": Exponential(config.ema_decay, config.ema_warmup)}
    decays |= {f"ema-{decay}": Exponential(decay, config.ema_warmup) for decay in config.ema_extra_decays}
    decays |= {stored_name(length): Power(length) for length in config.ema_lengths}
    heads: dict[str, nn.Module] = {
        name: alignment.get_submodule("head")
        for name, alignment in alignments.items()
        if alignment.velocity_head is not None
    }
    return {name: EMA(network, decay) for name, decay in decays.items()} | {
        f"{name}-head-{of}": EMA(head, decay) for name, head in heads.items() for of, decay in decays.items()
    }
