"""Contrastive Flow Matching (arXiv 2506.05350): the velocity is also kept away from that of another sample.

    L_neg = - mean |v_theta(x_t, t, y) - (eps' - x0')|^2

beside the flow-matching loss, with weight 0.05, at all times. (x0', eps') are data and noise of another sample of the
batch, and a sample that is alone has no loss. The batch is what one process holds in one micro-batch. With `negatives`
`all`, the default, the other sample is any ("arbitrary sample pairs" in the paper; in the released code this is the
loss that runs). With `other-class` it has another class, or is any if the batch has a single class: the released code
has this too, but its flag (--is-class-conditioned) changes nothing but the run's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import interpolant
from alignment.base import Alignment, AlignOptions, Context, squared_error
from models import VELOCITY
from runtime.options import option
from runtime.streams import Stream


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions(AlignOptions):
    """Options of Contrastive Flow Matching; the defaults are the paper's."""

    weight: float = option(
        0.05, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss"
    )
    negatives: str = option(
        "all", choices=("all", "other-class"), help="the other sample: any of the batch, or one of another class"
    )


class Contrastive(Alignment[ContrastiveOptions]):
    """Negative squared distance to another sample's velocity, a scalar."""

    name = "contrastive"
    Options = ContrastiveOptions
    coupled = True
    taps = (VELOCITY,)
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"paper": {"options": {}}}

    def draw(self, stream: Stream, count: int) -> dict[str, np.ndarray]:
        return {"choice": stream.uniform(count)}

    def forward(self, context: Context) -> Tensor:
        # to draw among all, every class counts as the same
        classes = context.labels if self.options.negatives == "other-class" else torch.zeros_like(context.labels)
        other, exists = others(classes, context.draws["choice"])
        target = interpolant.velocity(context.x0, context.eps)[other]
        return -(squared_error(context.features[VELOCITY], target) * exists).mean()


def others(labels: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Another sample for each sample, and whether it exists.

    Args:
        labels: (N,) classes.
        choice: (N,) numbers in [0, 1): the position among the candidates, in their order.

    Returns:
        (N,) int64 indices, of another class if the batch has one; (N,) bool.
    """
    # Candidates of each sample (row): the samples of another class, or all but itself if every class is the same.
    apart = labels[:, None] != labels
    allowed = torch.where(
        apart.any(1, keepdim=True), apart, ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    )
    count = allowed.sum(1)
    place = torch.minimum((choice * count).long(), (count - 1).clamp(min=0))
    # Its index is the number of samples at which the running count of candidates is still at most `place`.
    index = (allowed.cumsum(1) <= place[:, None]).sum(1)
    return index.clamp(max=len(labels) - 1), count > 0
