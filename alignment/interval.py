"""Which samples an alignment sees, by the interval of times and by their labels, and the mean that goes with them.

With `--align-interval a b` an alignment acts at the times a <= t <= b, in one of two ways (`--align-mask`):

    select     only the samples in range; their sum is divided by the full micro-batch, so that the rest counts as zero:
               L = (1 / N) sum over i in range of l_i. Teacher and head run on the samples in range only.
    upstream   all samples, the mean weighted by the global batch's share in range (the authors' code):
               L = share x (1 / N) sum over all i of l_i

Without an interval L is the plain mean. Samples whose label was dropped count as zero for an alignment that sees the
others only. With `--align-time-weights smooth` the samples that act have weights by their times, of mean 1 over the
global batch (`alignment.weights`). The host draws times and dropped labels, so it knows which samples are chosen and
what they weigh, and no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.weights import smooth
from runtime.errors import require
from runtime.transfer import to_device

Interval = tuple[float, float]
MASKS = ("select", "upstream")
WEIGHTS = ("none", "smooth")


def check(interval: Interval | None, mask: str) -> None:
    """Raise UserError for an interval outside [0, 1] or upside down, and for a mask without an interval."""
    require(
        interval is not None or mask == "select", "--align-mask upstream weighs by an interval: add --align-interval"
    )
    if interval is not None:
        low, high = interval
        require(0 <= low < high <= 1, f"--align-interval {low} {high} must satisfy 0 <= a < b <= 1")


@dataclass(frozen=True)
class Selection:
    """The part that one alignment's interval selects of one micro-batch of N samples."""

    # (m,) int64, of which the first `count` are the samples chosen; None for all N
    index: Tensor | None = None
    # factor on their mean: count / N with an `index`, times the share in range for mask `upstream`
    factor: float = 1.0
    # samples chosen, with an `index`
    count: int = 0
    # (count,) or (N,) their weights; None: all weigh 1
    weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        interval: Interval | None,
        mask: str,
        times: np.ndarray,
        part: slice,
        device: torch.device,
        few_sizes: bool = False,
        labelled: np.ndarray | None = None,
        time_weights: str = "none",
    ) -> Selection:
        """The selection for the samples `part` of the global batch, whose `times` (B,) are on the host.

        Samples that are not `labelled` (B,) are left out too and count as zero, with either mask. With `few_sizes` the
        index is padded to a multiple of N / 16 with samples whose loss is then left out: on a GPU, compiled code, its
        choice of kernels and the allocator then see only a few shapes.
        """
        inside = np.ones(len(times), bool) if interval is None else (times >= interval[0]) & (times <= interval[1])
        acting = np.ones_like(inside) if mask == "upstream" else inside
        if labelled is not None:
            acting = acting & labelled
        chosen = acting[part]
        share = float(inside.mean()) if mask == "upstream" else 1.0
        weights = None
        if time_weights == "smooth" and chosen.any():
            values = smooth(times)
            values = (values / values[acting].mean())[part][chosen].astype(np.float32)
            weights = to_device(torch.from_numpy(values), device)
        if chosen.all():
            return cls(factor=share, weights=weights)
        index, size = np.flatnonzero(chosen), len(chosen)
        count, step = len(index), max(1, size // 16)
        if few_sizes:
            filled = min(size, max(1, -(-count // step)) * step)
            # `mean` cuts the fillers off; if none is chosen, sample 0 stands in and a factor of 0 cancels its loss
            index = np.concatenate([index, np.full(filled - count, index[0] if count else 0)])
        return cls(to_device(torch.from_numpy(index), device), share * count / size, count, weights)

    def take(self, context: Any) -> Any:
        """The chosen samples of `context` and those that fill up; its first if none is chosen.

        A rank without a chosen sample still gives its head a gradient, of zero: some kernels refuse an empty batch.
        `context.take(index)` is the context of some samples.
        """
        if self.index is None:
            return context
        return context.take(self.index if len(self.index) else self.index.new_zeros(1))

    def mean(self, loss: Callable[[Any], Tensor], context: Any, coupled: bool = False) -> Tensor:
        """The mean of `loss(context)` over the micro-batch, a scalar.

        `loss` returns one value per sample, or a scalar if it is `coupled`.
        """
        value = loss(self.take(context))
        if self.index is not None and not coupled:
            value = value[: self.count or None]
        if self.weights is not None:
            value = value * self.weights
        return value.mean() * self.factor

    def sums(self, values: Tensor) -> Tensor:
        """(2,) the sum of `values` over the chosen samples and their number; (m,) values of what `take` returns."""
        count = len(values) if self.index is None else self.count
        return torch.stack([values[:count].sum(), values.new_full((), count)])


ALL = Selection()


def expected_share(interval: Interval | None, mask: str, time_sampling: str) -> float:
    """The expected share of the samples that an alignment works on, for uniform or logit-normal t."""
    if interval is None or mask != "select":
        return 1.0
    low, high = interval
    if time_sampling == "uniform":
        return high - low

    def below(t: float) -> float:  # distribution function of the logit-normal(0, 1)
        return (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2))) / 2 if 0 < t < 1 else float(t >= 1)

    return below(high) - below(low)
