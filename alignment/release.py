"""Measured release: an alignment ends once its residual has stopped falling (RARE, arXiv 2609.34732).

The residual of a step is the mean distance to the target over tokens, samples and processes, before any weight. Two
averages follow it, and both begin at the first one:

    m <- m + r (residual - m),   r = 50 / S (fast) and 2.5 / S (slow)

With S = 50,000, RARE's eighth of 400,000 steps, these are its decays 0.999 and 0.99995. From step S on they are read
every 100 steps. At the first reading with (slow - fast) / slow < 2 % the weight begins to fall along a cosine, to 0
after S steps; then the alignment is gone. A stop given in steps or epochs is the latest end.

The rule does not change with the unit of the residual, so that 1 - cos serves for RARE's (1 - cos) / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STEPS = 50_000
EVERY = 100  # steps between two readings, for each of which the host waits for the device
GAP = 0.02
FAST, SLOW = 50.0, 2.5
AVERAGES = "release.averages"  # where an alignment's state holds them


class Release(nn.Module):
    """The two averages of one alignment's residual, on its device; a checkpoint holds them among the heads.

    Args:
        steps: S.
    """

    averages: Tensor
    rates: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        # in float64: the slow one moves by millionths
        self.register_buffer("averages", torch.full((2,), math.nan, dtype=torch.float64))
        rates = torch.tensor([FAST / steps, SLOW / steps], dtype=torch.float64)
        self.register_buffer("rates", rates, persistent=False)

    @torch.no_grad()
    def update(self, residual: Tensor, taken: Tensor) -> None:
        """Follow the `residual` of a step, a scalar, where `taken`, a boolean scalar. Nothing waits for the device."""
        before = self.averages.where(~self.averages.isnan(), residual.double())
        after = before + self.rates * (residual - before)
        self.averages.copy_(after.where(taken, self.averages))

    def read(self) -> tuple[float, float]:
        """The fast and the slow average; waits for the device."""
        fast, slow = self.averages.tolist()
        return fast, slow


def flat(fast: float, slow: float) -> bool:
    """Whether the residual has stopped falling. Not before its first step, when both are NaN."""
    return slow - fast < GAP * slow


def rule(steps: int, latest: int | None) -> str:
    """The rule in words."""
    end = "" if latest is None else f"; at the latest it ends at step {latest}"
    return (
        f"ends by measurement: from step {steps} on, once the average of its residual over {steps / FAST:g} steps is "
        f"less than {GAP:.0%} below that over {steps / SLOW:g}, its weight falls to 0 within {steps} steps{end}"
    )
